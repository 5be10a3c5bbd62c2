"""data.classes: keeps only the images of some classes, to pre-train on a subset of the classes."""

import functools
import re
import unicodedata
from collections.abc import Callable, Mapping
from logging import getLogger

import numpy as np

from mae_jax.data.decode import BadImage
from mae_jax.data.sources.base import UNLABELED, Example, Source
from mae_jax.errors import UserError, did_you_mean

log = getLogger(__name__)

# ImageNet-1K by class number. MoCE (arXiv 2402.05382, Figure 1) splits it by WordNet; the exact classes are not
# known to us, and these are our approximation: animals (0 to 397), and fruits, flowers and fungi (984 to 998).
LISTS = {"imagenet_organisms": "0-397,984-998", "imagenet_rest": "398-983,999"}


def keep_classes(source: Source, text: str, by_place: bool = False) -> Source:
    """Returns the examples of the classes in `text`, renumbered in their old order.

    Args:
      source: has one label per example.
      text: a key of LISTS, or names, numbers and ranges of numbers, separated by commas: 'cat,dog', '0-9,12'.
      by_place: numbers are indices of classes even if class names are numbers, as in mae_jax 0.1.0.

    Raises:
      UserError: there are no such classes, or no labels to select by.
    """
    if not source.classes or "labels" in source.fields or source.annotations:
        raise UserError(f"data.classes={text!r} needs images with one label each")
    choose = places if by_place else numbers
    parts = [choose(part.strip(), source.classes) for part in LISTS.get(text, text).split(",")]
    chosen = sorted({number for part in parts for number in part})

    def read(i: int) -> int:
        try:
            return source.read(i).label
        except (BadImage, OSError):
            return UNLABELED

    labels = np.array([(source.label or read)(i) for i in range(source.size)])
    indices = np.flatnonzero(np.isin(labels, chosen))
    if not len(indices):
        raise UserError(f"no image has a class of data.classes={text!r}")
    anew = {old: new for new, old in enumerate(chosen)}
    part = source.only(indices)
    log.info("data.classes=%s keeps %d of %d images, %d of %d classes", text, part.size, source.size, len(chosen),
             len(source.classes))
    return Source(part.size, functools.partial(_read_anew, part.read, anew), part.name,
                  tuple(source.classes[number] for number in chosen), part.fields,
                  lambda i: anew[int(labels[indices[i]])])


def _read_anew(read: Callable[[int], Example], anew: Mapping[int, int], i: int) -> Example:
    example = read(i)
    return example._replace(label=anew[example.label])


def numbers(part: str, classes: tuple[str, ...]) -> range | list[int]:
    """Returns the class indices for a name, a number or a range; raises UserError if there are none.

    If class names are numbers, numbers mean the names; otherwise the indices of classes, from 0.
    """
    part = unicodedata.normalize("NFC", part)
    if part in classes:
        return [classes.index(part)]
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
    named = {place: int(name) for place, name in enumerate(classes) if re.fullmatch(r"\d+", name)}
    if not found or not named:
        return places(part, classes)
    first, last = int(found[1]), int(found[2] or found[1])
    by_name = [place for place, value in named.items() if first <= value <= last]
    by_place = range(first, last + 1) if first <= last < len(classes) else range(0)
    if len(named) < len(classes) and set(by_name) != set(by_place):
        shown = next(classes[place] for place in named)
        raise UserError(f"data.classes: {part!r} can be read in two ways: some classes, such as {shown!r}, have "
                        "numbers as names, and others do not; write names, separated by commas")
    missing = {first, last} - {named[place] for place in by_name}
    if missing or not by_name:
        raise UserError(f"data.classes: {part!r}, but no class is called {min(missing, default=first)}: if the names "
                        f"of classes are numbers, numbers are names, here {min(named.values())} to "
                        f"{max(named.values())}")
    return by_name


def places(part: str, classes: tuple[str, ...]) -> range | list[int]:
    """As `numbers`, but numbers always are indices of classes."""
    if part in classes:
        return [classes.index(part)]
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
    last = int(found[2] or found[1]) if found else len(classes)
    if found and int(found[1]) <= last < len(classes):
        return range(int(found[1]), last + 1)
    shown = classes[:20]
    raise UserError(f"data.classes: there is no class {part!r} among {len(classes)}; {did_you_mean(part, shown)}"
                    f"{' ...' if len(classes) > len(shown) else ''}; numbers go from 0 to {len(classes) - 1}, lists "
                    f"are {', '.join(LISTS)}")
