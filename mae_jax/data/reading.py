"""How images are read, by the config: accepted formats, EXIF orientation, and the conversion of 16 bits to 8."""

import functools
import logging
import math
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import AvifImagePlugin, features

from mae_jax.data import deep_images
from mae_jax.errors import UserError
from mae_jax.storage import file_kinds

log = logging.getLogger(__name__)

COMMON = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # the formats of mae_jax 0.2: data.formats=common
FORMATS = (*COMMON, "TIFF", "AVIF", "HEIF")
NAMES = {COMMON: "a JPEG, PNG, WebP, BMP or GIF image",
         FORMATS: "a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC image"}
EXTENSIONS = {"common": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")}  # data.formats → extensions of image files
EXTENSIONS["all"] = (*EXTENSIONS["common"], ".tif", ".tiff", ".avif", ".heic", ".heif")
_WITHOUT = "or leave such files out: --config.data.formats=common"
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # images are decoded in parallel already


class Reading(NamedTuple):
    """How images are read, by the config."""

    upright: bool = False  # rotated as EXIF says
    span: tuple[float, float] | None = None  # 16-bit values that become 0 and 255; None: the upper 8 bits
    formats: tuple[str, ...] = FORMATS

    @classmethod
    def of(cls, data: ConfigDict) -> "Reading":
        """Returns the reading for the config group `data`, whose 'auto' values are resolved."""
        return cls(data.exif != "ignore", span(data.range), COMMON if data.formats == "common" else FORMATS)


AS_STORED = Reading()


def span(text: str) -> tuple[float, float] | None:
    """Parses data.range: two numbers, or None for the upper 8 bits; an unresolved 'auto' is the full range of 16 bits.

    Raises:
      UserError: the text is none of these.
    """
    if text == "upper":
        return None
    if text == "auto":
        return 0.0, float(deep_images.HIGHEST)
    try:
        low, high = map(float, text.split(","))
        if not (low < high and math.isfinite(high - low)):
            raise ValueError
    except ValueError:
        raise UserError(f"data.range={text!r}; expected auto, upper, or two numbers, the lower one first, as 0,4095"
                        ) from None
    return low, high


def readers(data: bytes, formats: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the formats for Pillow to try; HEIF only for a file that may be HEIF, since it needs a package.

    Raises:
      UserError: the image is AVIF or HEIC, the config accepts it, and no installed package reads it.
    """
    common = tuple(name for name in formats if name != "HEIF")
    if data[4:8] != b"ftyp":
        return common
    kind = "AVIF" if b"avif" in data[8:64] else file_kinds.kind(data).removeprefix("a file of the kind ")
    if kind == "AVIF" and "AVIF" in formats and not features.check("avif"):
        raise UserError(f"an image is AVIF, which needs Pillow 11.3 or newer; run: pip install -U pillow; {_WITHOUT}")
    if kind in ("HEIC", "HEIF") and "HEIF" in formats:
        need_heif()
        return formats
    return common


@functools.cache
def need_heif() -> None:
    """Registers HEIC with Pillow; raises UserError if the package for it is missing."""
    try:
        import pillow_heif
    except ImportError:
        raise UserError(f"an image is HEIC; run: pip install 'mae_jax[heic]'; {_WITHOUT}") from None
    pillow_heif.options.DECODE_THREADS = 1
    pillow_heif.register_heif_opener(thumbnails=False)


def from_array(values: np.ndarray, span: tuple[float, float] | None) -> np.ndarray:
    """Converts pixels of 16 bits to uint8 of the same shape."""
    if span is None:
        return (values >> 8).astype(np.uint8)
    tell_cut(int(values.max()), *span)
    return np.asarray(deep_images.scaled(deep_images.Deep(values, None), *span))


def tell_cut(highest: int, low: float, high: float) -> None:
    """Warns once per process that values exceed data.range."""
    if highest > high:
        _tell_range(f"{low:g},{high:g}")


@functools.cache
def _tell_range(text: str) -> None:
    log.warning("images have values above data.range=%s, which become white; set data.range if another one is "
                "meant", text)
