"""Encoded images to RGB, and the judgement that a file is broken.

Content decides, not the file's extension. Formats: JPEG, PNG, WebP, BMP, GIF (first frame). EXIF rotation is ignored:
pixels come as they are stored, as TFDS and torchvision give them.
"""

import functools
import io
import re
import warnings
from types import ModuleType
from typing import NamedTuple

import numpy as np
from PIL import Image

from mae_jax.data.tensorflow_cpu import tf
from mae_jax.errors import UserError

MAX_PIXELS = 50_000_000
TOO_LARGE = f"it declares more than {MAX_PIXELS // 1_000_000} megapixels"
IGNORED = 255  # in a mask: a pixel of no class
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
JPEGS = ("JPEG", "MPO")  # as PIL calls them; MPO: with further images, of which the first counts
SCAN_MARKER, END_MARKER = b"\xff\xda", b"\xff\xd9"  # of a JPEG; neither occurs within a scan
MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # the next one of a JPEG, but for those within a scan and fillers
FAST_MARGIN = 1.5  # how much larger than the target a part must remain that the decoder shrinks
ORIENTATION, UPRIGHT = 0x0112, (0, 1)  # EXIF's tag, and its values for pixels that are stored as they are to be seen

# PIL refuses twice its limit, before it takes memory even for a GIF's frame, and warns above the limit.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.", category=UserWarning)  # odd metadata; the pixels decide


class BadImage(Exception):
    """The bytes are no image that can be used; the text says why."""


class Box(NamedTuple):
    """A part of an image, in whole pixels."""

    top: int
    left: int
    height: int
    width: int


class StoredImage:
    """An encoded or decoded image: its size is known at once, its pixels are decoded when asked for."""

    def __init__(self, data: bytes | np.ndarray, fast: bool = False):
        """Reads the header.

        Args:
          data: an encoded file, or pixels uint8 [height, width, 3].
          fast: allows decoding the wanted part only, and at reduced size.

        Raises:
          BadImage: no image, of an unknown format, or of more than 50 megapixels.
        """
        self._data, self._fast, self._rgb = data, fast, None
        if isinstance(data, np.ndarray):
            self._image = Image.fromarray(data)
        else:
            self._image = open_image(data)
            if self._image.format in JPEGS and not _ends(data):
                raise BadImage("cut off: no end marker after the last scan")
        self.width, self.height = self._image.size
        self.format = self._image.format  # None for pixels
        if self.width * self.height > MAX_PIXELS:
            raise BadImage(TOO_LARGE)

    def view(self, box: Box, target: tuple[int, int]) -> Image.Image:
        """Cuts `box` out and resizes it to `target` (height, width), in RGB.

        Exact: PIL's antialiased bicubic filter on the cut, as torchvision does. Fast: see `_fast_view`.

        Raises:
          BadImage: the pixels do not decode.
        """
        if not self._fused():
            part = self.whole().crop((box.left, box.top, box.left + box.width, box.top + box.height))
            return part.resize(target[::-1], Image.Resampling.BICUBIC)
        try:
            return _fast_view(self._data, box, target)
        except UserError:
            raise
        except Exception as error:
            raise BadImage(_reason(self._data, error)) from error

    def whole(self) -> Image.Image:
        """Returns the image in RGB, decoded once; raises BadImage when the pixels do not decode."""
        if self._rgb is None:
            try:
                self._rgb = to_rgb(self._image)
            except Exception as error:
                raise BadImage(_reason(self._data, error)) from error
        return self._rgb

    def converted(self) -> tuple[str, ...]:
        """Returns what of a file becomes something else in 8-bit RGB, or is ignored; () for pixels."""
        image, what = self._image, []
        if self.format is None:
            return ()
        if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
            what.append("grey")
        elif image.mode in ("P", "PA"):
            what.append("with a palette")
        elif image.mode == "CMYK":
            what.append("CMYK")
        if self.format == "PNG" and self._data[24] == 16:  # IHDR comes first: bits per channel
            what.append("of 16 bits")
        if image.has_transparency_data:
            what.append("with transparency")
        if self.format not in JPEGS and _animated(image):
            what.append("animated (first frame)")
        if image.info.get("exif") and _orientation(image) not in UPRIGHT:
            what.append("turned by EXIF (ignored)")
        return tuple(what)

    def _fused(self) -> bool:
        """Whether a part may be decoded alone; a file that was cut has been refused already."""
        return self._fast and self.format in JPEGS and self._image.mode in ("RGB", "L")


def _orientation(image: Image.Image) -> int:
    """Returns how an image's EXIF says that it is to be turned; 1, upright, where it cannot be read."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken bytes make PIL's reader raise many kinds
        return 1


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Reads the header of an encoded image; raises BadImage."""
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except Exception as error:  # PIL's plugins raise many kinds on broken bytes; all mean the same here
        raise BadImage(_reason(data, error)) from error


def _ends(data: bytes) -> bool:
    """Whether a JPEG has its end marker, whatever follows it: phones append films, whose bytes look like markers."""
    if data.rfind(END_MARKER) > data.rfind(SCAN_MARKER):
        return True
    place = 2
    while found := MARKER.search(data, place):
        if found[0] == END_MARKER:
            return True
        place = found.end() + int.from_bytes(data[found.end():found.end() + 2])  # past the segment, or a scan's header
    return False


def _animated(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # of a GIF: its second frame is broken, which nobody sees
        return True


def decode_mask(data: bytes, offset: int = 0) -> np.ndarray:
    """Reads an image of class numbers, uint8 [height, width]; of several channels the first, of a palette the index.

    Args:
      offset: is subtracted; what lies below it becomes 255, and 255 (to ignore) stays.

    Raises:
      BadImage: it does not decode, or has more than 8 bits or 50 megapixels.
    """
    try:
        values = np.asarray(open_image(data))
    except Exception as error:
        raise BadImage(f"mask: {_reason(data, error)}") from error
    values = values[..., 0] if values.ndim == 3 else values
    if values.dtype not in (np.uint8, bool):
        raise BadImage(f"a mask of {values.dtype}; expected 8 bits")
    values = values.astype(np.int16)
    return np.where((values < offset) | (values == IGNORED), IGNORED, values - offset).astype(np.uint8)


def decode(data: bytes) -> np.ndarray:
    """Returns the pixels of an encoded image, uint8 [height, width, 3]; raises BadImage."""
    return np.asarray(StoredImage(data).whole())


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any PIL mode: transparency is laid over white, 16 bits lose the lower 8, CMYK as PIL converts it."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")


def _fast_view(data: bytes, box: Box, target: tuple[int, int]) -> Image.Image:
    """Decodes what `box` needs of a JPEG, and resizes it to `target`.

    Below a factor of two OpenCV resizes without antialiasing, which matters little there: bilinear where it shrinks,
    bicubic where it enlarges. Above, the JPEG decoder itself shrinks by 2, 4 or 8 where there is room for it, and
    PIL's antialiased Hamming filter goes on from there.
    """
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
    """Returns the module cv2, confined to the calling thread; raises UserError where it is missing."""
    try:
        import cv2
    except ImportError:
        raise UserError("data.resize='fast' needs OpenCV; run: pip install opencv-python-headless") from None
    cv2.setNumThreads(1)
    return cv2


def _reason(data: bytes | np.ndarray, error: Exception) -> str:
    """Returns why an image is bad, in one short line."""
    if not len(data):
        return "empty file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a JPEG, PNG, WebP, BMP or GIF picture"
    if isinstance(error, Image.DecompressionBombError):
        return TOO_LARGE
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text[:120]
