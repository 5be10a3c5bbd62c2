"""Label lists beside the images of a split without class folders, such as ImageNet's validation set.

Text files that name each image and its class are read (Tiny-ImageNet's val_annotations.txt, LOC_val_solution.csv of
Kaggle's ImageNet, Caffe's val.txt with numbers of the sorted classes), and files with one class per image in the order
of the images' names (imagenet_2012_validation_synset_labels.txt).
"""

import logging
import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from mae_jax.data.sources import splits
from mae_jax.data.sources.base import UNLABELED
from mae_jax.data.sources.folder_listing import nfc
from mae_jax.errors import UserError

log = logging.getLogger(__name__)

EXTENSIONS = (".txt", ".csv", ".tsv")
MAX_BYTES = 1 << 28  # largest file that is considered
MAX_FILES = 64  # most files of a folder that are considered


class LabelList(NamedTuple):
    """The labels of a split's images, from a file."""

    file: epath.Path
    labels: np.ndarray  # int32 [images], -1 without one
    unknown: tuple[str, ...]  # names in the file that are no class


def find(places: Iterable[epath.Path], split: str, pictures: Sequence[str], classes: tuple[str, ...]
         ) -> LabelList | None:
    """Returns the list that labels the most images of a split; None if no file is a label list.

    Args:
      places: folders whose files are considered.
      split: the name of the split's folder; a file without image names must be named for the same split.
      pictures: names of the images.
      classes: names of the classes.

    Raises:
      UserError: a list has numbers that are not clearly those of the sorted classes.
    """
    best = None
    for place in dict.fromkeys(places):
        files = [file for file in sorted(place.iterdir()) if file.name.lower().endswith(EXTENSIONS)
                 and "submission" not in file.name.lower()]  # Kaggle's sample submissions hold placeholders
        if len(files) > MAX_FILES:  # such as one caption file per image
            files = [file for file in files if _is_for(file.name, split)][:MAX_FILES]
        for file in files:
            if not file.is_file() or file.stat().length > MAX_BYTES:
                continue
            found = _read(file, split, pictures, classes)
            if found and (best is None or (found.labels >= 0).sum() > (best.labels >= 0).sum()):
                best = found
    return best


def _read(file: epath.Path, split: str, pictures: Sequence[str], classes: tuple[str, ...]) -> LabelList | None:
    text = nfc(file.read_bytes().decode("utf-8-sig", "replace"))
    rows = [_fields(line) for line in text.splitlines()
            if line.strip() and not line.startswith("# ")]
    places = {}
    for place, picture in enumerate(pictures):
        name = picture.rsplit("/", 1)[-1]
        places.update({picture: place, name: place, os.path.splitext(name)[0]: place})
    pairs = [row for row in _classes_second(rows, classes) if len(row) > 1]
    named = [(places[row[0]], row[1]) for row in pairs if row[0] in places]
    if not named and _is_for(file.name, split) and len(rows) == len(pictures) and all(len(row) == 1 for row in rows):
        named = [(place, row[0]) for place, row in enumerate(rows)]
        _check_order(file, pictures)
    if not named:
        return None
    found = {label for _, label in named}
    if found.isdisjoint(classes) and all(re.fullmatch(r"\d+", label) for label in found) and not (
            _is_for(file.name, split) and len(named) == len(rows)):
        return None  # a table of images has numbers that need not be class numbers
    if len(found) == 1 and len(classes) > 1 and len(named) > 1:
        log.warning("%s gives all images one class, and is not used as a list of labels", file)
        return None
    index = _index(file, found, classes)
    labels = np.full(len(pictures), UNLABELED, np.int32)
    for place, label in named:
        labels[place] = index.get(label, UNLABELED)
    return LabelList(file, labels, tuple(sorted({label for _, label in named} - index.keys())))


def _classes_second(rows: list[list[str]], classes: tuple[str, ...]) -> list[list[str]]:
    """Returns the rows with the class column second: the column that names a class most often."""
    def hits(column: int) -> int:
        return sum(len(row) > column and row[column] in known for row in rows)

    known = set(classes)
    column = max(range(1, max(map(len, rows), default=1)), key=hits, default=1)
    return rows if column == 1 or not hits(column) else [[row[0], row[column]] for row in rows if len(row) > column]


def _check_order(file: epath.Path, pictures: Sequence[str]) -> None:
    """Raises UserError if the names sort differently as texts than by their numbers, as 10.jpg and 2.jpg."""
    natural = sorted(pictures, key=lambda name: [int(part) if part.isdigit() else part
                                                 for part in re.split(r"(\d+)", name)])
    if natural != list(pictures):
        first = next(a for a, b in zip(pictures, natural, strict=True) if a != b)
        raise UserError(f"{file} has one class per line without names, and the images can be sorted in two ways "
                        f"(at {first}: as text, or by the numbers in the names); write name and class in each line")


def _fields(line: str) -> list[str]:
    """Splits a line into fields; LOC_val_solution.csv has boxes after the class, which are removed."""
    separator = next((each for each in ("\t", ",", ";") if each in line), None)
    fields = [field.strip().strip('"') for field in line.strip().split(separator)]
    if len(fields) > 1 and fields[1] and separator == ",":
        boxes = re.fullmatch(r"(\S+)((?: \d+){4})+(?: .*)?", fields[1])
        fields[1] = boxes[1] if boxes else fields[1]
    return fields


def _is_for(name: str, split: str) -> bool:
    """Returns whether a file name contains the name of a split."""
    words = re.findall(r"[a-z]+", name.casefold())
    return splits.role(split) in {splits.role(word) for word in words}


def _index(file: epath.Path, found: set[str], classes: tuple[str, ...]) -> dict[str, int]:
    """Returns the list's name of a class → its number; names take precedence over numbers."""
    index = {name: number for number, name in enumerate(classes)}
    if found & index.keys() or not all(re.fullmatch(r"\d+", label) for label in found):
        return index
    numbers = {int(label) for label in found}
    if 0 not in numbers or max(numbers) >= len(classes):
        raise UserError(f"{file} has the numbers {min(numbers)} to {max(numbers)} for classes; expected the names of "
                        f"the {len(classes)} class folders, or 0 to {len(classes) - 1} in their sorted order "
                        "(ImageNet's development kit numbers them otherwise); write the names, or remove the file")
    return {label: int(label) for label in found}
