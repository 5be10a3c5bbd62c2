"""Images of 16 bits per channel, read with all bits; a range of their values becomes 0 to 255 (data.range).

Pillow has no mode for three channels of 16 bits: it unpacks the upper bytes. Unpacked with the opposite byte order, the
same file gives the lower bytes.
"""

import functools
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from mae_jax.data import tiff

HIGHEST = 65_535
STRIP = 1_000_000  # pixels whose two bytes are joined at a time
OTHER_END = {"L": "B", "B": "L", "N": "B" if np.little_endian else "L"}  # last letter of 'RGB;16L'; N: native order


class Deep(NamedTuple):
    """The pixels of an image of 16 bits per channel."""

    values: np.ndarray  # uint16 [height, width], or [.., 3]
    alpha: np.ndarray | None  # uint8 [height, width]; None: opaque
    inverted: bool = False  # whether 0 is white


def is_deep(image: Image.Image) -> bool:
    """Returns whether an opened image, whose pixels are not loaded yet, has more than 8 bits per channel."""
    return image.mode.startswith("I") or any(";16" in str(_raw(tile)) for tile in getattr(image, "tile", ()))


def read(image: Image.Image, data: bytes, again: Callable[[bytes], Image.Image]) -> Deep:
    """Reads all bits of an image.

    Args:
      image: opened, and not loaded.
      data: the content of its file.
      again: opens an image from the content of a file.

    Raises:
      Pillow's exceptions for pixels that do not decode.
    """
    if str(_raw(image.tile[0])).startswith("LA;16"):  # a PNG; a pixel has the bytes of an 8-bit RGBA pixel
        pixels = np.asarray(again(_png_as_rgba(data)))
        return Deep(pixels[..., 0].astype(np.uint16) << 8 | pixels[..., 1], pixels[..., 2])
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.uint16)
        return Deep(values, _opacity(values, transparent), image.format == "TIFF" and tiff.is_inverted(data))
    lower = again(data)
    lower.tile = [tile._replace(args=_swapped(tile)) for tile in lower.tile]
    upper, lower = np.asarray(image), np.asarray(lower)
    values, rows = np.empty((*upper.shape[:2], 3), np.uint16), max(1, STRIP // upper.shape[1])
    for top in range(0, len(values), rows):
        part = slice(top, top + rows)
        values[part] = upper[part, :, :3].astype(np.uint16) << 8 | lower[part, :, :3]
    return Deep(values, upper[..., 3] if upper.shape[2] == 4 else _opacity(values, transparent))


def scaled(deep: Deep, low: float, high: float) -> Image.Image:
    """Returns the image in 8 bits: `low` becomes 0 and `high` 255; values outside are clipped."""
    table = _table(low, high)
    pixels = (255 - table if deep.inverted else table)[deep.values]
    if deep.alpha is None:
        return Image.fromarray(pixels)
    color = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, -1)
    return Image.fromarray(np.dstack([color, deep.alpha]))


@functools.lru_cache(maxsize=8)
def _table(low: float, high: float) -> np.ndarray:
    """Returns the 8-bit value of each 16-bit value, uint8 [65536]; halves are rounded to even."""
    return np.clip(np.rint((np.arange(HIGHEST + 1) - low) * (255 / (high - low))), 0, 255).astype(np.uint8)


def _opacity(values: np.ndarray, transparent: object) -> np.ndarray | None:
    """Returns uint8 [height, width], 0 where a pixel has the value or color that a PNG declares transparent, or None.
    """
    if not isinstance(transparent, int | tuple):
        return None
    same = values == np.array(transparent, np.uint16)
    return np.where(same.all(-1) if values.ndim == 3 else same, 0, 255).astype(np.uint8)


def _raw(tile: object) -> object:
    """Returns the raw mode of a tile, such as 'RGB;16B'."""
    args = getattr(tile, "args", "")
    return args[0] if isinstance(args, tuple) and args else args


def _swapped(tile: object) -> object:
    raw = str(_raw(tile))
    other = raw[:-1] + OTHER_END[raw[-1]]
    return (other, *tile.args[1:]) if isinstance(tile.args, tuple) else other


def _png_as_rgba(data: bytes) -> bytes:
    """Returns a 16-bit PNG of gray and alpha as an 8-bit PNG of four channels, one per byte."""
    header = b"IHDR" + data[16:24] + bytes([8, 6]) + data[26:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


