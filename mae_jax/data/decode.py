"""Decodes images to RGB, and defines which files are broken.

The format is detected from the content, not from the extension: JPEG, PNG, WebP, BMP, GIF (first frame), TIFF (first
page), AVIF and HEIC. Images are rotated as EXIF says if data.exif wants it; TFDS and torchvision give pixels as stored.
TIFF and HEIC files have orientation tags of their own, which always apply. A range of 16-bit values becomes 8 bits
(data.range, `deep_images`).

Every image costs bounded time and memory: the bounds of `mae_jax.data.image_bounds` are checked before decoding. An
image that did not decode is remembered, and not decoded again.
"""

import errno
import functools
import hashlib
import io
import os
import threading
import time
import warnings
from types import ModuleType
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from mae_jax.data import deep_images, tiff
from mae_jax.data.image_bounds import (
    JPEGS,
    MAX_PIXELS,
    TOO_LARGE,
    BadImage,
    check_bytes,
    check_scans,
    check_size,
    ends,
    without_ballast,
)
from mae_jax.data.reading import AS_STORED, COMMON, FORMATS, NAMES, Reading, from_array, readers, tell_cut
from mae_jax.errors import UserError
from mae_jax.storage import file_kinds
from mae_jax.storage.ranges import read_whole

MAX_REASON = 160  # characters of a reason
MAX_REMEMBERED = 10_000  # bad images, each with a hash and the reason: 2 MB
STRIP = 1_000_000  # pixels composed over white at a time
IGNORED = 255  # value of mask pixels without a class
FAST_MARGIN = 1.5  # times the target's size that a part keeps after the decoder shrinks it
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR)
WAITS = (0.1, 0.5, 2.0)  # seconds before each retry; our choice
ORIENTATION = 0x0112  # EXIF tag
TURNS = {  # orientation → transpose that makes the image upright; other values need none
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}
SIDEWAYS = tuple(TURNS[value] for value in (5, 6, 7, 8))

# PIL raises above twice its limit, before it allocates memory even for a GIF's frame, and warns above the limit.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.", category=UserWarning)  # odd metadata; only pixels count


class _Remembered:
    """Images that did not decode in this process, so that the next epoch need not decode them again.

    The key is a hash of all bytes of an image, so a remembered reason equals that of a new attempt.
    """

    def __init__(self) -> None:
        self._reasons: dict[int, dict[bytes, str]] = {}  # length → hash → reason; most lengths need no hash
        self._count, self._changing = 0, threading.Lock()

    def reason(self, data: bytes) -> str:
        """Returns why an image did not decode; '' if it is not remembered."""
        known = self._reasons.get(len(data))
        return known.get(_digest(data), "") if known else ""

    def add(self, data: bytes, reason: str) -> None:
        with self._changing:
            if self._count >= MAX_REMEMBERED:
                self._reasons, self._count = {}, 0
            self._reasons.setdefault(len(data), {})[_digest(data)] = reason
            self._count += 1


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


_remembered = _Remembered()


class Box(NamedTuple):
    """A part of an image, in whole pixels."""

    top: int
    left: int
    height: int
    width: int


class StoredImage:
    """An encoded or decoded image; its size is known at once, its pixels are decoded on demand."""

    def __init__(self, data: bytes | np.ndarray, fast: bool = False, reading: Reading = AS_STORED):
        """Reads the header.

        Args:
          data: an encoded file, or pixels uint8 or uint16 [height, width, 3].
          fast: allows decoding only the needed part, and at reduced size.
          reading: how images are read, by the config.

        Raises:
          BadImage: the data are no image, of an unknown format, truncated, or exceed one of the bounds.
        """
        self._data, self._fast, self._rgb, self._reading = data, fast, None, reading
        if isinstance(data, np.ndarray):
            self._image = Image.fromarray(data if data.dtype == np.uint8 else from_array(data, reading.span))
            check_size(*self._image.size)
        else:
            self._image = open_image(data, reading.formats)
            if self._image.format in JPEGS and not ends(data):
                raise BadImage("cut off: no end marker after the last scan")
        self.format = self._image.format  # None for pixels
        self.deep = self.format is not None and deep_images.is_deep(self._image)  # more than 8 bits per channel
        # The transpose of the stored pixels, or None.
        self.turn = TURNS.get(_orientation(self._image)) if reading.upright and self.format else None
        self.width, self.height = self._image.size[::-1] if self.turn in SIDEWAYS else self._image.size

    @property
    def plain_jpeg(self) -> bool:
        """Whether this is a color or gray JPEG without rotation, of which a part can be decoded alone."""
        return self.turn is None and self.format in JPEGS and self._image.mode in ("RGB", "L")

    def view(self, box: Box, target: tuple[int, int]) -> Image.Image:
        """Crops `box` and resizes it to `target` (height, width), in RGB.

        Exact: PIL's antialiased bicubic filter on the crop, as in torchvision. Fast: see `_fast_view`.

        Raises:
          BadImage: the pixels do not decode.
          MemoryError: memory is exhausted.
        """
        if not self._fused():
            part = self.whole().crop((box.left, box.top, box.left + box.width, box.top + box.height))
            return part.resize(target[::-1], Image.Resampling.BICUBIC)
        try:
            return _fast_view(self._data, box, target)
        except UserError:
            raise
        except Exception as error:  # not remembered: another part may decode
            raise _bad(self._data, error) from error

    def whole(self) -> Image.Image:
        """Returns the image in RGB, decoded once; raises BadImage if the pixels do not decode now or did not before."""
        if self._rgb is None and self.format is None:
            self._rgb = to_rgb(self._image)
        elif self._rgb is None:
            if reason := _remembered.reason(self._data):
                raise BadImage(reason)
            try:
                rgb = to_rgb(self._image if not self.deep or self._reading.span is None else self._scaled())
                self._rgb = rgb if self.turn is None else rgb.transpose(self.turn)
            except Exception as error:
                bad = _bad(self._data, error)
                if isinstance(bad, BadImage):
                    _remembered.add(self._data, str(bad))
                raise bad from error
        return self._rgb

    def highest(self) -> int:
        """Returns the largest value of an image of more than 8 bits; raises BadImage."""
        try:
            return int(self._all_bits().values.max())
        except Exception as error:
            raise _bad(self._data, error) from error

    def _all_bits(self) -> deep_images.Deep:
        return deep_images.read(self._image, self._data, lambda data: open_image(data, self._reading.formats))

    def _scaled(self) -> Image.Image:
        deep, (low, high) = self._all_bits(), self._reading.span
        tell_cut(int(deep.values.max()), low, high)
        return deep_images.scaled(deep, low, high)

    def converted(self) -> tuple[str, ...]:
        """Returns the properties of the file that 8-bit RGB does not keep; () for pixels."""
        image, what = self._image, []
        if self.format is None:
            return ()
        if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
            what.append("gray")
        elif image.mode in ("P", "PA"):
            what.append("with a palette")
        elif image.mode == "CMYK":
            what.append("CMYK")
        if self.deep:
            what.append("of 16 bits")
        if image.has_transparency_data:
            what.append("with transparency")
        if self.format == "TIFF" and tiff.page(self._data).others:
            what.append("of several pages (first page)")
        elif self.format not in JPEGS and _animated(image):
            what.append("animated (first frame)")
        if _orientation(image) in TURNS:
            what.append("turned by EXIF" if self.turn is not None else "turned by EXIF (ignored)")
        return tuple(what)

    def _fused(self) -> bool:
        """Whether a part can be decoded alone; truncated files were rejected before."""
        return self._fast and self.plain_jpeg


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of an image; 1, upright, if it has none that is readable.

    Pillow rotates a TIFF, and libheif a HEIC, by tags of their own.
    """
    if image.format in ("TIFF", "HEIF"):
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1) if image.info.get("exif") else 1
    except Exception:  # PIL raises many types on broken bytes
        return 1


def read_file(path: epath.Path) -> bytes:
    """Returns the content of an image file; transient errors of network file systems are retried.

    Raises:
      BadImage: the file is larger than an image may be.
      OSError: the file cannot be read.
      UserError, MemoryError: file descriptors or memory are exhausted, which is no fault of the file.
    """
    for wait in WAITS:
        try:
            return _read_once(path)
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(wait)
    return _read_once(path)


def _read_once(path: epath.Path) -> bytes:
    try:
        if "://" not in str(path):
            check_bytes(os.stat(path).st_size)
        return read_whole(path)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise UserError(f"cannot read {path}: {error.strerror}; raise the limit (ulimit -n), or take fewer "
                            "data.threads") from None
        if error.errno == errno.ENOMEM:
            raise MemoryError(str(error)) from None
        raise


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Reads the header of an encoded image, within the bounds of time and memory; raises BadImage."""
    try:
        check_bytes(len(data))
        if tiff.is_tiff(data) and "TIFF" in formats:
            data = tiff.alone(data)
        image = Image.open(io.BytesIO(without_ballast(data)), formats=readers(data, formats))
        check_size(*image.size)
        if image.format in JPEGS:
            check_scans(data, image.width * image.height)
        return image
    except (BadImage, UserError):
        raise
    except Exception as error:  # PIL's plugins raise many types on broken bytes; all mean a bad image
        raise _bad(data, error, formats) from error


def _animated(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # a GIF whose second frame, which is not used, is broken
        return True


def decode_mask(data: bytes, offset: int = 0) -> np.ndarray:
    """Decodes an image of class numbers, uint8 [height, width]: one channel, equal ones, or the palette index.

    Args:
      offset: is subtracted; values below it become 255, and 255 (ignored) stays.

    Raises:
      BadImage: the mask does not decode, has colors or more than 8 bits, or exceeds a bound.
    """
    try:
        values = np.asarray(open_image(data))
    except Exception as error:
        bad = error if isinstance(error, BadImage) else _bad(data, error)
        raise (BadImage(f"mask: {bad}") if isinstance(bad, BadImage) else bad) from error
    if values.ndim == 3:
        if values.shape[2] > 2 and (values[..., 1:3] != values[..., :1]).any():
            raise BadImage("a mask of colors without a palette; expected one channel, the number of the class")
        values = values[..., 0]
    if values.dtype not in (np.uint8, bool):
        raise BadImage(f"a mask of {values.dtype}; expected 8 bits")
    values = values.astype(np.int16)
    return np.where((values < offset) | (values == IGNORED), IGNORED, values - offset).astype(np.uint8)


def decode(data: bytes) -> np.ndarray:
    """Returns the pixels of an encoded image, uint8 [height, width, 3]; raises BadImage."""
    return np.asarray(StoredImage(data).whole())


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any PIL mode to RGB: transparency is composed over white, 16 bits lose the lower 8, PIL converts CMYK.
    """
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.load()
    if image.has_transparency_data:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """Composes an image over white in strips, which takes a third of the memory of doing it at once."""
    whole, rows = Image.new("RGB", image.size), max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", part.size, "white")
        whole.paste(Image.alpha_composite(white, part).convert("RGB"), (0, top))
    return whole


def _fast_view(data: bytes, box: Box, target: tuple[int, int]) -> Image.Image:
    """Decodes the part `box` of a JPEG, and resizes it to `target`.

    Below a factor of two, OpenCV resizes without antialiasing, which matters little there: bilinear to shrink, bicubic
    to enlarge. From two on, the JPEG decoder first shrinks by 2, 4 or 8 if enough pixels remain, and PIL's antialiased
    Hamming filter does the rest.
    """
    from mae_jax.data.tensorflow_cpu import tf

    shrinks = box.height / target[0], box.width / target[1]
    ratio = max(r for r in (1, 2, 4, 8) if r == 1 or min(shrinks) >= FAST_MARGIN * r)
    top, left = box.top // ratio, box.left // ratio
    bottom, right = -(-(box.top + box.height) // ratio), -(-(box.left + box.width) // ratio)
    pixels = np.asarray(tf.raw_ops.DecodeAndCropJpeg(
        contents=data, crop_window=[top, left, bottom - top, right - left], channels=3, ratio=ratio,
        fancy_upscaling=True, try_recover_truncated=False, acceptable_fraction=1, dct_method="INTEGER_ACCURATE"))
    if max(shrinks) < 2:
        cv2 = opencv()
        kind = cv2.INTER_LINEAR if min(shrinks) >= 1 else cv2.INTER_CUBIC
        return Image.fromarray(cv2.resize(pixels, target[::-1], interpolation=kind))
    x, y = box.left / ratio - left, box.top / ratio - top
    part = (x, y, x + box.width / ratio, y + box.height / ratio)
    return Image.fromarray(pixels).resize(target[::-1], Image.Resampling.HAMMING, box=part)


@functools.cache
def opencv() -> ModuleType:
    """Returns the module cv2, restricted to the calling thread; raises UserError if it is missing."""
    try:
        import cv2
    except ImportError:
        raise UserError("data.resize='fast' needs OpenCV; run: pip install opencv-python-headless") from None
    cv2.setNumThreads(1)
    return cv2


def _bad(data: bytes, error: Exception, formats: tuple[str, ...] = FORMATS) -> Exception:
    """Returns a BadImage with the reason in one short line; a MemoryError if memory is exhausted, not the image bad."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError" or "out of memory" in text:
        return MemoryError(f"while an image was decoded: {text[:120]}")
    if not len(data):
        text = "empty file"
    elif isinstance(error, Image.UnidentifiedImageError):
        found = file_kinds.kind(data)
        text = f"not {NAMES.get(formats, NAMES[COMMON])}{f', but {found}' if found else ''}"
        if "TIFF" in formats and tiff.is_tiff(data):
            text = "a TIFF of a kind that Pillow does not read"
        elif found in [f"a {name} image" for name in formats]:
            text = f"damaged: it begins as {found}, and cannot be opened"
    elif isinstance(error, Image.DecompressionBombError):
        text = TOO_LARGE
    return BadImage(text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}...")
