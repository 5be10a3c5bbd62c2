"""How the config has images read: which formats, turned or not, and which values of 16 bits become 8."""

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

COMMON = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # all that mae_jax 0.2 read: data.formats=common
FORMATS = (*COMMON, "TIFF", "AVIF", "HEIF")
NAMES = {COMMON: "a JPEG, PNG, WebP, BMP or GIF picture",
         FORMATS: "a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC picture"}
EXTENSIONS = {"common": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")}  # data.formats → of files that are images
EXTENSIONS["all"] = (*EXTENSIONS["common"], ".tif", ".tiff", ".avif", ".heic", ".heif")
_WITHOUT = "or leave such files out: --config.data.formats=common"
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # there are threads, or processes, of ours


class Reading(NamedTuple):
    """How images are read, as the config says."""

    upright: bool = False  # turned as EXIF says
    span: tuple[float, float] | None = None  # of 16 bits: what becomes 0 and 255; None: the upper 8 bits
    formats: tuple[str, ...] = FORMATS

    @classmethod
    def of(cls, data: ConfigDict) -> "Reading":
        """Returns that of the group `data` of a config without 'auto'."""
        return cls(data.exif != "ignore", span(data.range), COMMON if data.formats == "common" else FORMATS)


AS_STORED = Reading()


def span(text: str) -> tuple[float, float] | None:
    """Returns what data.range says: two numbers, None for the upper 8 bits; all of 16 bits where nothing is decided.

    Raises:
      UserError: it says neither.
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
    """Returns which formats Pillow is to try: HEIF for a file that may be one alone, since that needs its package.

    Raises:
      UserError: for an AVIF or HEIC that the config would have read, where no installed package reads it.
    """
    common = tuple(name for name in formats if name != "HEIF")
    if data[4:8] != b"ftyp":
        return common
    kind = "AVIF" if b"avif" in data[8:64] else file_kinds.kind(data).removeprefix("a file of the kind ")
    if kind == "AVIF" and "AVIF" in formats and not features.check("avif"):
        raise UserError(f"an image is AVIF, which Pillow reads from version 11.3 on: pip install -U pillow; {_WITHOUT}")
    if kind in ("HEIC", "HEIF") and "HEIF" in formats:
        need_heif()
        return formats
    return common


@functools.cache
def need_heif() -> None:
    """Has Pillow open HEIC; raises UserError where the package for that is missing."""
    try:
        import pillow_heif
    except ImportError:
        raise UserError(f"an image is HEIC; run: pip install 'mae_jax[heic]'; {_WITHOUT}") from None
    pillow_heif.options.DECODE_THREADS = 1
    pillow_heif.register_heif_opener(thumbnails=False)


def from_array(values: np.ndarray, span: tuple[float, float] | None) -> np.ndarray:
    """Returns pixels of 16 bits in 8."""
    if span is None:
        return (values >> 8).astype(np.uint8)
    tell_cut(int(values.max()), *span)
    return np.asarray(deep_images.scaled(deep_images.Deep(values, None), *span))


def tell_cut(highest: int, low: float, high: float) -> None:
    """Says once in a process that values lie above data.range."""
    if highest > high:
        _tell_range(f"{low:g},{high:g}")


@functools.cache
def _tell_range(text: str) -> None:
    log.warning("images have values above data.range=%s, which all become white; another range may be meant", text)
