"""Thumbnails of embedded images, read again from the source that the file of features names."""

import io
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from mae_jax.data.sources.base import RecordStream
from mae_jax.errors import UserError
from mae_jax.inference.embedding_files import Record
from mae_jax.inference.parts import Part, opened_as, same_images
from mae_jax.ops.patches import PatchGrid

SIDE = 64  # pixels
COLUMNS = 32  # columns and rows of a sheet
BATCH = 64  # images read at a time
GRAY = 128  # value of a missing image
QUALITY = 75  # of WebP


class Thumbnails(NamedTuple):
    """Thumbnails of images.

    Attributes:
      pixels: uint8 [n, SIDE, SIDE, 3], gray for missing images.
      there: bool [n], False for missing images.
      note: a sentence about a problem with the source; '': none.
    """

    pixels: np.ndarray
    there: np.ndarray
    note: str


def of(about: Mapping[str, Any], rows: Record) -> Thumbnails:
    """Reads each image again and crops the central part that the encoder saw.

    Args:
      about: the metadata of the file of features.
      rows: rows of the file.
    """
    pixels = np.full((len(rows.file), SIDE, SIDE, 3), GRAY, np.uint8)
    there, note = np.zeros(len(rows.file), bool), ""
    try:
        parts = opened_as({**about, "image_size": (SIDE, SIDE)})
        if same_images(about, parts):
            numbers = _by_id(about, rows)
        else:
            numbers = _by_name(parts, rows)
            note = "Other images are there now than were embedded; thumbnails are those of the same name."
    except (UserError, OSError) as error:
        return Thumbnails(pixels, there, f"The images are not here: {error}")
    for number, part in enumerate(parts):
        at = np.flatnonzero((numbers[:, 0] == number) & (numbers[:, 1] >= 0) & (numbers[:, 1] < part.size))
        if len(at):
            pixels[at], there[at] = _read(part, numbers[at, 1])
    pixels[~there] = GRAY
    return Thumbnails(pixels, there, note)


def _by_id(about: Mapping[str, Any], rows: Record) -> np.ndarray:
    """Returns the index of the part and of the image in it, int64 [n, 2]; `rows.id` counts over all parts."""
    starts = np.cumsum([0, *(size for _, size in about["splits"])])
    part = np.searchsorted(starts, rows.id, side="right") - 1
    return np.stack([part, rows.id - starts[part]], 1)


def _by_name(parts: Sequence[Part], rows: Record) -> np.ndarray:
    """Returns, as `_by_id`, the images that now have the names of the rows, int64 [n, 2]; -1 if there is none."""
    known = {(part.split, part.name(k)): (number, k) for number, part in enumerate(parts) for k in range(part.size)}
    return np.array([known.get((split, file), (-1, -1)) for split, file in zip(rows.split, rows.file, strict=True)],
                    np.int64)


def _read(part: Part, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images with these indices in a part.

    Returns:
      Pixels, uint8 [n, SIDE, SIDE, 3], and whether the image could be read, bool [n].
    """
    wanted, inverse = np.unique(numbers, return_inverse=True)
    grid = PatchGrid.of(part.config)
    config = part.config.copy_and_resolve_references().unlock()
    config.batch_size = BATCH
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "patches": ((grid.num_patches, grid.patch_dim), np.uint8), "order": ((grid.num_patches,), np.int32),
        "valid": ((), np.float32)}
    spec = {name: jax.ShapeDtypeStruct((BATCH, *shape), dtype) for name, (shape, dtype) in shapes.items()}
    source = part.source
    if not isinstance(source, RecordStream):  # a stream is read as a whole, and the other images dropped
        source, wanted = source.only(wanted), np.arange(len(wanted))
    found, valid, first = [], [], 0
    for batch in replace(part, config=config.lock(), source=source).batches(spec, np.arange(BATCH), deque()):
        at = wanted[(wanted >= first) & (wanted < first + BATCH)] - first
        found.append(grid.unpatchify(batch["patches"][at], batch["order"][at]))
        valid.append(batch["valid"][at] > 0)
        first += BATCH
        if first > wanted[-1]:
            break
    return np.concatenate(found)[inverse], np.concatenate(valid)[inverse]


def sheets(pixels: np.ndarray) -> list[bytes]:
    """Returns thumbnails, uint8 [n, SIDE, SIDE, 3], as WebP sheets of COLUMNS x COLUMNS thumbnails in raster order."""
    made = []
    for first in range(0, len(pixels), COLUMNS * COLUMNS):
        part = pixels[first:first + COLUMNS * COLUMNS]
        lines = -(-len(part) // COLUMNS)
        filled = np.full((lines * COLUMNS, *part.shape[1:]), GRAY, np.uint8)
        filled[:len(part)] = part
        sheet = filled.reshape(lines, COLUMNS, SIDE, SIDE, 3).swapaxes(1, 2).reshape(lines * SIDE, COLUMNS * SIDE, 3)
        content = io.BytesIO()
        Image.fromarray(sheet).save(content, "WEBP", quality=QUALITY, method=2)
        made.append(content.getvalue())
    return made
