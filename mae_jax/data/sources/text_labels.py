"""Text labels, slices and label counts, shared by the sources of files with labels."""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.sources import patterns, splits
from mae_jax.data.sources.base import UNLABELED, Source, numbered_classes
from mae_jax.errors import pluralize

USUAL = {"image_key": "image", "label_key": "label"}  # defaults of the config group `data`
NUMBER = re.compile(r"-1|\d{1,9}")


def classes_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Returns the class names of text labels, without '': sorted, or '0' to the highest if all are numbers.

    Raises:
      UserError: a number is too high to be a class number.
    """
    names = set(texts) - {""}
    if names and all(NUMBER.fullmatch(name) for name in names):
        return numbered_classes(np.array([int(name) for name in names]))
    return tuple(sorted(names))


def numbers(texts: Sequence[str], classes: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the labels, int32 [texts], -1 for none, and the sorted texts that are no class."""
    index = {name: number for number, name in enumerate(classes)}
    counted = classes == tuple(map(str, range(len(classes))))  # then '007' is 7
    known: dict[str, int] = {"": UNLABELED}
    for text in set(texts) - {""}:
        name = str(int(text)) if counted and NUMBER.fullmatch(text) else text
        known[text] = index.get(name, UNLABELED)
    strange = {text for text, number in known.items() if text and number < 0} - ({"-1"} if counted else set())
    return np.array([known[text] for text in texts], np.int32), tuple(sorted(strange))


def sliced(data: ConfigDict, source: Source, split: splits.Split, ending: str) -> Source:
    """Returns the examples in the slice of a split, selected by a hash of their names.

    A slice by index, of files that are sorted by class, would hold only some classes.

    Raises:
      UserError: the slice counts examples.
    """
    whole = patterns.by_split(data.path, ending)
    start, stop = split.shares(*((0, 1) if whole else splits.part(split.name, splits.holds_out(data))))
    if (start, stop) == (0, 1):
        return source
    return source.only(splits.within(map(source.name, range(source.size)), start, stop))


def told(data: ConfigDict, opened: Mapping[str, Source]) -> list[str]:
    """Returns a text per split: its images, the classes of the training split, and the images without a label."""
    parts = []
    for field, source in opened.items():
        classes = f" in {len(source.classes)} classes" if source.classes and field == "train_split" else ""
        parts.append(f"{data[field]}: {pluralize(source.size, 'image')}{classes}{_unlabeled(source)}")
    return parts


def asked(data: ConfigDict, key: str) -> str:
    """Returns the value of a field of the config group `data`, '' if it is the default."""
    name = data.get(key, "")
    return "" if name == USUAL.get(key, "") else name


def _unlabeled(source: Source) -> str:
    """Returns the text about images without a label, '' if there are none."""
    lost = sum(source.label(i) < 0 for i in range(source.size)) if source.classes and source.label else 0
    return f" ({lost} without a label)" if lost else ""
