"""Interfaces of the sources: examples with random access, or streams of records."""

import bisect
import functools
import hashlib
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mae_jax.data.decode import decode_mask
from mae_jax.data.identity import sampled, short_hash
from mae_jax.data.image_bounds import BadImage
from mae_jax.data.objects import Annotations, Objects
from mae_jax.data.sources import splits
from mae_jax.errors import UserError, did_you_mean, printable

MAX_DIGESTED = 50_000_000  # names that are hashed; up to twice as many
MAX_CLASSES = 1_000_000  # higher labels are not class numbers
UNLABELED = -1
BEGINNING = 65_536  # bytes hashed at the beginning of a record file
READERS = 16  # threads that read: a bucket has a high latency, but serves many requests at once


class Example(NamedTuple):
    """One stored image."""

    image: bytes | np.ndarray  # an encoded file, or uint8 [height, width, 3]
    label: int = UNLABELED
    labels: np.ndarray | None = None  # multiple labels: uint8 [C], 1 where a class is in the image
    mask: np.ndarray | None = None  # uint8 [height, width], the class of each pixel; 255: ignored
    objects: Objects | None = None


@dataclass(frozen=True)
class Source:
    """A split whose examples can be read in any order, from any thread.

    To be picklable for worker processes, `read` and `name` must be functions of a module, or `functools.partial` of
    one; the arguments they hold are sent along. For nested functions, threads make the examples.
    """

    size: int
    read: Callable[[int], Example]  # index → example; OSError and BadImage mean a bad image
    name: Callable[[int], str]  # index → name of the example in messages
    classes: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()  # of 'labels', 'pixel_label' and the fields of objects, those that the examples have
    label: Callable[[int], int] | None = None  # index → label, if known without decoding the image
    unknown_classes: tuple[str, ...] = ()  # classes that the training split lacks: unlabeled
    drawn: Callable[[int, int], int] | None = None  # (seed, number of a training draw) → index; None: by epochs
    annotations: Annotations | None = None  # if its examples have objects

    def digest(self) -> str:
        """Returns a short hash of the examples' names in order; for very many examples, of some names.

        Names that are only indices, as in npz files and TFDS, identify no more than the number of examples.
        """
        digest, every = hashlib.sha256(), max(1, self.size // MAX_DIGESTED)
        if every > 1:  # hashing a billion names takes many minutes
            digest.update(str(self.size).encode())
        for i in range(0, self.size, every):
            digest.update(self.name(i).encode() + b"\0")
        return digest.hexdigest()[:16]

    def identity(self) -> dict[str, str]:
        """Returns path-independent hashes of the examples: of all names, and of the content of 64 examples."""
        indices = [int(index) for index in sampled(self.size)]
        first = [self._content(index) for index in indices[:1]]  # alone, since it may fill caches for all others
        with ThreadPoolExecutor(READERS) as pool:
            content = [*first, *pool.map(self._content, indices[1:])]
        return {"names": self.digest(), "content": short_hash(part for parts in content for part in parts)}

    def _content(self, index: int) -> list[bytes]:
        try:
            example = self.read(index)
        except (OSError, BadImage):
            return [b"unreadable"]
        fields = [example.image, np.int64(example.label), example.labels, example.mask]
        if example.objects:
            fields += [example.objects.box, example.objects.label]
        return [field if isinstance(field, bytes) else b"" if field is None else np.ascontiguousarray(field).tobytes()
                for field in fields]

    def only(self, indices: np.ndarray) -> "Source":
        """Returns the source of the examples with these indices, int [n], in this order."""
        of = functools.partial
        return Source(len(indices), of(_chosen, self.read, indices), of(_chosen, self.name, indices), self.classes,
                      self.fields, self.label and of(_chosen, self.label, indices), self.unknown_classes,
                      annotations=self.annotations and replace(
                          self.annotations, truth=of(_chosen, self.annotations.truth, indices)))

    def sliced(self, split: splits.Split) -> "Source":
        """Returns the slice of this split that an expression defines."""
        start, stop = split.bounds(self.size)
        if (start, stop) == (0, self.size):
            return self
        return self.only(np.arange(start, stop))

    def joined(self, other: "Source") -> "Source":
        """Returns the examples of both, this one's first; `other` has the same classes and fields."""
        def of(what: str) -> Callable[[int], Any]:
            return functools.partial(_either, self.size, getattr(self, what), getattr(other, what))

        truth = self.annotations and other.annotations and replace(
            self.annotations, masks=self.annotations.masks and other.annotations.masks,
            truth=functools.partial(_either, self.size, self.annotations.truth, other.annotations.truth))
        return Source(self.size + other.size, of("read"), of("name"), self.classes, self.fields,
                      of("label") if self.label and other.label else None,
                      tuple(dict.fromkeys(self.unknown_classes + other.unknown_classes)), annotations=truth)


def _chosen(function: Callable[[int], Any], indices: np.ndarray, i: int) -> Any:
    return function(int(indices[i]))


def _either(size: int, ours: Callable[[int], Any], theirs: Callable[[int], Any], i: int) -> Any:
    return ours(i) if i < size else theirs(i - size)


def numbered_name(name: str, i: int) -> str:
    """Returns 'name[i]', the name of an example without a name of its own."""
    return f"{name}[{i}]"


def printable_name(names: Sequence[str], i: int) -> str:
    """Returns the i-th name as one line that any terminal can show."""
    return printable(names[i])


def _beginning(file: str) -> bytes:
    try:
        with epath.Path(file).open("rb") as opened:
            return opened.read(BEGINNING)
    except OSError:
        return b"unreadable"


def numbered_classes(labels: np.ndarray) -> tuple[str, ...]:
    """Returns '0', '1', ... up to the highest of the integer labels [n]; raises UserError if it is absurdly high."""
    highest = int(labels.max(initial=UNLABELED))
    if highest >= MAX_CLASSES:
        raise UserError(f"the label {highest} is not a class number; expected 0 to {MAX_CLASSES - 1}, or -1 for none")
    return tuple(map(str, range(highest + 1)))


def class_numbers(values: np.ndarray, what: str) -> np.ndarray:
    """Converts labels of any numeric type to int64 [n]; floats must be whole, NaN means no label.

    Args:
      values: [n].
      what: their name in messages.

    Raises:
      UserError: the values are no class numbers.
    """
    if values.dtype.kind == "f":
        known = np.where(np.isnan(values), UNLABELED, values)
        if not (np.isfinite(known) & (known == np.rint(known)) & (np.abs(known) < 2**53)).all():
            odd = values[~(known == np.rint(known)) | ~np.isfinite(known) | (np.abs(known) >= 2**53)][0]
            raise UserError(f"{what} are {values.dtype}, such as {odd}; expected integers, or whole numbers of "
                            "classes (or no labels, with data.label_key='')")
        return known.astype(np.int64)
    if values.dtype.kind not in "iub":
        raise UserError(f"{what} are {values.dtype}; expected integers")
    if len(values) and int(values.max()) >= MAX_CLASSES:
        raise UserError(f"{what}: the label {values.max()} is not a class number; expected 0 to {MAX_CLASSES - 1}, or "
                        "-1 for none")
    return values.astype(np.int64)


def multi_hot(present: np.ndarray, classes: int) -> np.ndarray:
    """Returns uint8 [classes], 1 at the class numbers `present`."""
    labels = np.zeros(classes, np.uint8)
    labels[np.asarray(present, np.int64)] = 1
    return labels


def package_folder(module: str, package: str, why: str) -> Path:
    """Returns the folder of an installed package without importing it; raises UserError with the pip command."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"data.source={why!r} needs the package {package}; run: pip install {package}")
    return Path(spec.submodule_search_locations[0])


def known_split(split: splits.Split, known: tuple[str, ...]) -> None:
    """Raises UserError unless the split's name is known."""
    if split.name not in known:
        raise UserError(f"unknown split {split.name!r}; {did_you_mean(split.name, known)}")


Instruction = tuple[int, int, int]  # file, records to skip, records to take


@dataclass(frozen=True)
class RecordStream:
    """A split stored as TFRecord files of tf.train.Example, or a slice of one."""

    files: tuple[str, ...]
    counts: tuple[int, ...]  # records in each file
    start: int  # the slice is records start ... start + size - 1 of all files in order
    size: int
    mean_bytes: float  # of a record
    image_key: str
    label_key: str  # '' without labels
    classes: tuple[str, ...] = ()
    multi_label: bool = False  # label_key is a list of classes
    mask_key: str = ""  # '' without masks
    mask_offset: int = 0  # see decode_mask
    promised_by: str = ""  # origin of the declared counts; '' if records were counted

    @property
    def fields(self) -> tuple[str, ...]:
        """Those of 'labels' and 'pixel_label' that its examples have."""
        return ("labels",) * self.multi_label + ("pixel_label",) * bool(self.mask_key)

    def example(self, image: bytes, label: int, labels: np.ndarray, mask: bytes) -> Example:
        """Returns the example of a parsed record; raises BadImage if its mask does not decode."""
        return Example(image, label, labels if self.multi_label else None,
                       decode_mask(mask, self.mask_offset) if self.mask_key else None)

    def joined(self, other: "RecordStream") -> "RecordStream":
        """Returns the records of both splits, this one's first; raises UserError if a slice leaves a gap between them.
        """
        if self.start + self.size < sum(self.counts) or other.start:
            raise UserError("a sum of slices of TFRecord files must continue from the end of one split to the start of "
                            "the next, as 'train+validation'")
        size = self.size + other.size
        mean_bytes = (self.mean_bytes * self.size + other.mean_bytes * other.size) / max(size, 1)
        return replace(self, files=self.files + other.files, counts=self.counts + other.counts, size=size,
                       mean_bytes=mean_bytes)

    def name(self, record: int) -> str:
        """Returns the name of a record, numbered across all files."""
        ends = list(itertools.accumulate(self.counts))
        file = bisect.bisect_right(ends, record)
        return f"{printable(self.files[file])}, record {record - ends[file] + self.counts[file]}"

    def digest(self) -> str:
        """Returns a short hash of the records' files and counts."""
        files = [(file.rsplit("/", 1)[-1], count) for file, count in zip(self.files, self.counts, strict=True)]
        return hashlib.sha256(repr((files, self.start, self.size)).encode()).hexdigest()[:16]

    def identity(self) -> dict[str, str]:
        """Returns path-independent hashes of the records: of file names and counts, and of how 64 files begin."""
        with ThreadPoolExecutor(READERS) as pool:
            begin = list(pool.map(_beginning, (self.files[i] for i in sampled(len(self.files)))))
        return {"names": self.digest(), "content": short_hash([f"{self.mean_bytes:.6f}".encode(), *begin])}

    def instructions(self, start: int, size: int) -> list[Instruction]:
        """Returns the parts of files that hold records start ... start + size - 1 of this slice."""
        first, last, offset, found = self.start + start, self.start + start + size, 0, []
        for file, count in enumerate(self.counts):
            low, high = max(first, offset), min(last, offset + count)
            if low < high:
                found.append((file, low - offset, high - low))
            offset += count
        return found
