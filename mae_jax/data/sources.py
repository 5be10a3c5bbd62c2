"""The table of sources, and what a source with random access is."""

import functools
import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data import splits
from mae_jax.errors import UserError, nearest
from mae_jax.files import check_bucket

if TYPE_CHECKING:
    from mae_jax.data.streams import Stream

MOST_CLASSES = 1_000_000  # beyond it, labels are taken for something else
UNLABELLED = -1

BUILT_IN = ("mnist5k", "photo_crops", "photo_mosaic")  # sources that come with a package
# data.source → the module that has `load(data, split)`. Imported when asked for: some need packages of their own.
MODULES = {
    "clipart": "mae_jax.data.clipart",
    "folder": "mae_jax.data.folder",
    "mnist5k": "mae_jax.data.mnist5k",
    "npz": "mae_jax.data.npz",
    "photo_crops": "mae_jax.data.photo_crops",
    "photo_mosaic": "mae_jax.data.photo_mosaic",
    "tfds": "mae_jax.data.tfds",
    "tfrecord": "mae_jax.data.tfrecord",
}


class Example(NamedTuple):
    """One stored picture."""

    picture: bytes | np.ndarray  # an encoded file, or uint8 [height, width, 3]
    label: int = UNLABELLED
    labels: np.ndarray | None = None  # several labels: uint8 [C], 1 where a class is there
    mask: np.ndarray | None = None  # uint8 [height, width], the class of each pixel; 255: to ignore


@dataclass(frozen=True)
class Source:
    """A split whose examples can be read in any order, from any thread."""

    size: int
    read: Callable[[int], Example]  # index → example; OSError and BadPicture mean a bad picture
    name: Callable[[int], str]  # index → what to call the example in a message
    classes: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()  # which of 'labels' and 'mask' its examples have
    label: Callable[[int], int] | None = None  # index → label, where it is known without decoding the picture

    def digest(self) -> str:
        """Returns a short hash of which examples these are, by their names in their order.

        Names that are mere numbers, as of npz files and TFDS, tell no more than how many there are.
        """
        digest = hashlib.sha256()
        for i in range(self.size):
            digest.update(self.name(i).encode() + b"\0")
        return digest.hexdigest()[:16]

    def only(self, indices: np.ndarray) -> "Source":
        """Returns the source of these examples, in this order."""
        return Source(len(indices), lambda i: self.read(int(indices[i])), lambda i: self.name(int(indices[i])),
                      self.classes, self.fields, self.label and (lambda i: self.label(int(indices[i]))))

    def sliced(self, split: splits.Split) -> "Source":
        """Returns the part of this split that an expression names."""
        start, stop = split.bounds(self.size)
        if (start, stop) == (0, self.size):
            return self
        return self.only(np.arange(start, stop))

    def joined(self, other: "Source") -> "Source":
        """Returns the examples of both, this one's first; `other` has the same classes and fields."""
        def of(what: str) -> Callable[[int], Any]:
            ours, theirs = getattr(self, what), getattr(other, what)
            return lambda i: ours(i) if i < self.size else theirs(i - self.size)

        return Source(self.size + other.size, of("read"), of("name"), self.classes, self.fields,
                      of("label") if self.label and other.label else None)


def load(data: ConfigDict, expression: str) -> "Source | Stream":
    """Opens one split of the config's source, or a sum of several ('train+validation').

    Raises:
      UserError: an unknown source or split, nothing there, an empty split, or a sum that cannot be read.
    """
    if data.source not in MODULES:
        raise UserError(f"unknown data.source {data.source!r}; {nearest(data.source, [*MODULES, 'batches'])}")
    if data.get("path") and data.source in BUILT_IN:
        raise UserError(f"data.source={data.source!r} does not read data.path={data.path!r}; leave it out, or name a "
                        "source that reads it (the argument `runlocal` of a recipe takes photo crops for any data)")
    check_bucket(data.get("path") or "")
    module = importlib.import_module(MODULES[data.source])
    source = functools.reduce(lambda one, other: one.joined(other),
                              [module.load(data, split) for split in splits.parts(expression)])
    if not source.size:
        raise UserError(f"the split {expression!r} of data.source={data.source!r} has no pictures")
    if not data.get("classes"):
        return source
    from mae_jax.data.class_lists import kept

    if not isinstance(source, Source):
        raise UserError(f"data.classes={data.classes!r} needs data with random access, which a stream of records has "
                        "not: python -m mae_jax.inspect --write=array_record stores them so")
    return kept(source, data.classes)


def same_split(data: ConfigDict, one: str, other: str) -> bool:
    """Whether two names of splits mean the same pictures: data without splits have one held-out part, 'test' or 'val'.
    """
    named = getattr(importlib.import_module(MODULES[data.source]), "split_name", lambda data, name: name)
    return one == other or named(data, one) == named(data, other)


def further(data: ConfigDict, text: str, classes: tuple[str, ...]) -> "tuple[Source | Stream, np.ndarray]":
    """Opens a further test set of TFDS: 'imagenet_v2', or 'NAME:SPLIT' where the split is not 'test'.

    Args:
      data: where the training data are, with TFDS's name for their label.
      classes: names of the training classes.

    Returns:
      The set, and int32 [its classes]: the training class that has the name of each.

    Raises:
      UserError: it is not there, or has a class that the training data lack.
    """
    if data.source != "tfds":
        raise UserError(f"eval.sets={text!r} is a set of TFDS, beside training data with data.source='tfds', "
                        f"not {data.source!r}")
    name, _, split = text.partition(":")
    data = data.copy_and_resolve_references()
    data.name = name
    found = load(data, split or "test")
    index = {known: number for number, known in enumerate(classes)}
    unknown = [label for label in found.classes if label not in index]
    if unknown or not found.classes:
        what = f"class {unknown[0]!r}, which the training data lack" if unknown else "no classes"
        raise UserError(f"eval.sets={text!r} has {what}: nothing to compare")
    return found, np.array([index[label] for label in found.classes], np.int32)


def numbered_classes(labels: np.ndarray) -> tuple[str, ...]:
    """Returns '0' ... for the classes of integer labels [n], up to the highest; raises UserError for absurd ones."""
    highest = int(labels.max(initial=UNLABELLED))
    if highest >= MOST_CLASSES:
        raise UserError(f"the label {highest} is no class number; expected 0 to {MOST_CLASSES - 1}, or -1 for none")
    return tuple(map(str, range(highest + 1)))


def multi_hot(present: np.ndarray, classes: int) -> np.ndarray:
    """Returns uint8 [classes], 1 at the class numbers `present`."""
    labels = np.zeros(classes, np.uint8)
    labels[np.asarray(present, np.int64)] = 1
    return labels


def package_folder(module: str, package: str, why: str) -> Path:
    """Returns the folder of an installed package without importing it; raises UserError with the pip line."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"data.source={why!r} reads files of the package {package}: pip install {package}")
    return Path(spec.submodule_search_locations[0])


def known_split(split: splits.Split, known: tuple[str, ...]) -> None:
    """Raises UserError unless the split's name is known."""
    if split.name not in known:
        raise UserError(f"unknown split {split.name!r}; {nearest(split.name, known)}")
