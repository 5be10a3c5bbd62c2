"""Labels that come as texts: names of classes, or their numbers."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from mae_jax.data.sources.base import UNLABELED, numbered_classes

NUMBER = re.compile(r"-1|\d{1,9}")


def classes_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of the classes of labels, '' being none: sorted, or '0' to the highest where all are numbers.

    Raises:
      UserError: a number is too high to be one of a class.
    """
    names = set(texts) - {""}
    if names and all(NUMBER.fullmatch(name) for name in names):
        return numbered_classes(np.array([int(name) for name in names]))
    return tuple(sorted(names))


def numbers(texts: Sequence[str], classes: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the labels, int32 [texts], -1 for none, and the sorted names among them that are no class."""
    index = {name: number for number, name in enumerate(classes)}
    counted = classes == tuple(map(str, range(len(classes))))  # '007' is 7 there
    known: dict[str, int] = {"": UNLABELED}
    for text in set(texts) - {""}:
        name = str(int(text)) if counted and NUMBER.fullmatch(text) else text
        known[text] = index.get(name, UNLABELED)
    strange = {text for text, number in known.items() if text and number < 0} - ({"-1"} if counted else set())
    return np.array([known[text] for text in texts], np.int32), tuple(sorted(strange))
