"""Audits a split by decoding every image in full: sizes, formats, labels, broken images and duplicates."""

import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from mae_jax.data import writers
from mae_jax.data.decode import JPEGS, StoredImage
from mae_jax.data.reading import AS_STORED, Reading
from mae_jax.data.sources import base
from mae_jax.data.sources.base import Example
from mae_jax.data.transforms.crop import mask_image
from mae_jax.data.transforms.detection import check_size
from mae_jax.runtime import progress

FORMATS_BY_EXTENSION = {".jpg": JPEGS, ".jpeg": JPEGS, ".png": ("PNG",), ".webp": ("WEBP",), ".bmp": ("BMP",),
                        ".gif": ("GIF",), ".tif": ("TIFF",), ".tiff": ("TIFF",), ".avif": ("AVIF",),
                        ".heic": ("HEIF",), ".heif": ("HEIF",)}
DIGEST = 16  # bytes of an image's hash


class Look(NamedTuple):
    """Properties of one good image."""

    size: tuple[int, int]  # width, height
    format: str  # '' for decoded pixels
    converted: tuple[str, ...]  # see StoredImage.converted
    digest: bytes  # hash of the file's bytes, or of decoded pixels
    blank: bool  # a single color
    labels: tuple[int, ...]  # those of the objects, if it has any


@dataclass
class Audit:
    """Properties of a split, 25 bytes per good image. Examples are numbered from 0."""

    source: writers.Found
    sizes: np.ndarray  # int32 [n, 2], width and height; 0 if broken or not read
    digests: np.ndarray  # uint8 [n, 16]
    blank: np.ndarray  # bool [n]
    formats: Counter[str] = field(default_factory=Counter)
    converted: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    unlabeled: int = 0
    misnamed: list[str] = field(default_factory=list)  # 'name is FORMAT', for another extension
    broken: list[str] = field(default_factory=list)  # 'name: reason'
    faults: list[str] = field(default_factory=list)  # damaged or incomplete record files
    seconds: float = 0.0

    def name(self, number: int) -> str:
        """Returns the name of an example."""
        return self.source.name(number + _first(self.source))

    def good(self) -> np.ndarray:
        """Returns the indices of the good images, int64 [k]."""
        return np.flatnonzero(self.sizes[:, 0])

    def shown(self) -> np.ndarray:
        """Returns the indices of the good images that are not blank; duplicates of blank images mean nothing."""
        return np.flatnonzero((self.sizes[:, 0] > 0) & ~self.blank)

    def keys(self) -> np.ndarray:
        """Returns the hashes of the images that are not blank, as sortable values [k]."""
        return self.digests[self.shown()].view(f"S{DIGEST}").ravel()


def audit(source: writers.Found, threads: int, what: str, reading: Reading = AS_STORED) -> Audit:
    """Decodes every image of a split by the config's reading; reports progress under the name `what`."""
    size = source.size
    seen = Audit(source, np.zeros((size, 2), np.int32), np.zeros((size, DIGEST), np.uint8), np.zeros(size, bool))
    began = time.monotonic()
    with progress.doing(f"looking at {what}", size) as line:
        for number, found in writers.each(source, partial(look, reading=reading), threads, faults=seen.faults):
            if isinstance(found, Exception):
                seen.broken.append(f"{source.name(number)}: {found}")
            else:
                _add(seen, number - _first(source), found)
            line.advance()
    seen.seconds = time.monotonic() - began
    return seen


def look(example: Example, reading: Reading = AS_STORED) -> Look:
    """Decodes an example in full and returns its properties; raises BadImage."""
    data, stored = example.image, StoredImage(example.image, reading=reading)
    blank = stored.whole().getcolors(1) is not None
    mask_image(stored, example.mask)
    key = repr(data.shape).encode() if isinstance(data, np.ndarray) else b""
    digest = hashlib.blake2b(np.ascontiguousarray(data) if key else data, digest_size=DIGEST, key=key).digest()
    several = () if example.labels is None else map(int, np.flatnonzero(example.labels))
    labels = (example.label,) if example.labels is None and example.label >= 0 else tuple(several)
    if example.objects is not None:
        check_size(stored, example.objects)
        labels = tuple(map(int, example.objects.label[~example.objects.crowd]))
    return Look((stored.width, stored.height), stored.format or "", stored.converted(), digest, blank, labels)


def copies(keys: np.ndarray) -> tuple[int, list[np.ndarray]]:
    """Returns how many keys repeat another, and the indices of each group of equal keys, in order of first occurrence.
    """
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.append(True, keys[order][1:] != keys[order][:-1])) if len(keys) else np.zeros(0, int)
    lengths = np.diff(np.append(starts, len(keys)))
    groups = [order[start:start + length] for start, length in zip(starts, lengths, strict=True) if length > 1]
    return len(keys) - len(starts), sorted(groups, key=lambda group: group[0])


def _add(seen: Audit, number: int, found: Look) -> None:
    seen.sizes[number] = found.size
    seen.digests[number] = np.frombuffer(found.digest, np.uint8)
    seen.blank[number] = found.blank
    seen.formats[found.format] += 1
    seen.converted.update(found.converted)
    seen.labels.update(found.labels)
    seen.unlabeled += not found.labels
    name = seen.name(number)
    if found.format and found.format not in FORMATS_BY_EXTENSION.get(os.path.splitext(name)[1].lower(), found.format):
        seen.misnamed.append(f"{name} is {found.format}")


def _first(source: writers.Found) -> int:
    """Returns the number of the first example; records are numbered across all their files."""
    return source.start if isinstance(source, base.RecordStream) else 0
