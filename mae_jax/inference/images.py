"""Converts a caller's images to examples; the evaluation's transform then gives the same patches as for a source."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from mae_jax.data.decode import ORIENTATION, TURNS, read_file, to_rgb
from mae_jax.data.image_bounds import BadImage
from mae_jax.data.sources.base import Example
from mae_jax.data.transforms.example import ExampleBuilder
from mae_jax.errors import UserError, printable
from mae_jax.storage.paths import locate

# One image: an array of pixels, uint8 [height, width, 3] (or [height, width], one channel, or four with transparency)
# or uint16 without transparency, whose range data.range is mapped to 0 to 255; a PIL image; bytes of an encoded file;
# or a path.
ImageLike: TypeAlias = Any
CHANNELS = (1, 3, 4)
MODES_OF_NUMBERS = ("I", "F")  # PIL's modes of 32-bit integers and floats


def as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """Converts one image, an array [B, height, width, channels] or an iterable of images to a list of images.

    An array of texts, or a column of a table, is a list of paths.

    Raises:
      UserError: the type or the shape of an array is none of these.
    """
    if isinstance(images, str | bytes | os.PathLike | Image.Image):
        return [images]
    if hasattr(images, "ndim") and not isinstance(images, list | tuple):
        array = np.asarray(images)
        if array.ndim == 4 or (array.ndim == 1 and array.dtype.kind in "OTU"):
            return array.tolist() if array.ndim == 1 else list(array)
        if array.ndim == 3 and array.shape[2] not in CHANNELS:
            raise UserError(f"an array of {array.dtype} {list(array.shape)} is neither an image [height, width, 3] nor "
                            "several [images, height, width, 3]; gray ones are given as a list of [height, width]"
                            f"{_channels_first(array.shape)}")
        return [array]
    if not isinstance(images, Iterable):
        raise UserError(f"images of type {type(images).__name__}; expected arrays, PIL images, bytes or paths")
    return list(images)


def _channels_first(shape: tuple[int, ...]) -> str:
    """Returns a hint for arrays with channels first, as in PyTorch; '' for others."""
    return "; channels come last: numpy.moveaxis(image, 0, -1)" if len(shape) == 3 and shape[0] in CHANNELS else ""


def as_example(image: ImageLike, upright: bool = True) -> Example:
    """Converts an image to an example, as a source would give it.

    Args:
      image: see `ImageLike`. Transparency is composited over white. A PIL image with 16 bits keeps all of them if it is
        gray, and only the upper 8 if it is in color, since Pillow drops the others.
      upright: whether to rotate a PIL image to its EXIF orientation; for encoded bytes, the transform does so.

    Raises:
      UserError: the type, shape or dtype is not supported, or there is no such file.
      BadImage: the image cannot be decoded.
    """
    if isinstance(image, bytes):
        return Example(image)
    if isinstance(image, str | os.PathLike):
        return Example(_content(os.fspath(image)))
    if isinstance(image, Image.Image):
        return Example(_of_pil(image, upright))
    if hasattr(image, "ndim"):
        return Example(_of_array(np.asarray(image)))
    raise UserError(f"an image of type {type(image).__name__}; expected an array, a PIL image, bytes or a path")


def patches_of(builder: ExampleBuilder, image: ImageLike, ratio: float, upright: bool) -> np.ndarray:
    """Returns the patches of an image after the evaluation's transform, uint8 [N, P].

    Args:
      builder: has the transform.
      image: see `ImageLike`.
      ratio: crop ratio of the transform.
      upright: as in `as_example`.

    Raises:
      UserError: the image cannot be used; the message names its file.
    """
    try:
        return np.asarray(builder.evaluate(as_example(image, upright), 0, 0, ratio)["patches"])
    except BadImage as error:
        what = printable(os.fspath(image)) if isinstance(image, str | os.PathLike) else "an image"
        raise UserError(f"{what} cannot be read: {error}") from None


def _content(path: str) -> bytes:
    try:
        return read_file(locate(path))
    except BadImage as error:
        raise UserError(f"{printable(path)} cannot be read: {error}") from None
    except OSError as error:
        several = "; embed and predict accept a folder or a pattern" * (
            isinstance(error, IsADirectoryError) or bool(set("*?[") & set(path)))
        raise UserError(f"{printable(path)} cannot be read: {error.strerror or error}{several}") from None


def _of_pil(image: Image.Image, upright: bool) -> np.ndarray:
    """Converts a PIL image to pixels, uint8 or uint16 [height, width, 3]; raises UserError or BadImage."""
    if 0 in image.size:
        raise UserError(f"a PIL image of {image.width} x {image.height} pixels is empty")
    if image.mode in MODES_OF_NUMBERS:
        raise UserError(f"a PIL image of mode {image.mode}, whose range of values is unknown; expected 8 or 16 bits")
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1)) if upright else None
        if image.mode.startswith("I;16"):
            image = image if turn is None else image.transpose(turn)
            return _of_array(np.asarray(image).astype(np.uint16))
        rgb = to_rgb(image)
    except Exception as error:  # PIL decodes lazily, and raises many exceptions for damaged files
        raise BadImage(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    return np.asarray(rgb if turn is None else rgb.transpose(turn))


def _of_array(array: np.ndarray) -> np.ndarray:
    """Converts an array (see `ImageLike`) to pixels, uint8 or uint16 [height, width, 3]; raises UserError."""
    gray = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if not array.size or gray.ndim not in (2, 3) or (gray.ndim == 3 and gray.shape[2] not in CHANNELS):
        raise UserError(f"an image of shape {list(array.shape)}; expected pixels [height, width, 3] or [height, width]"
                        f"{_channels_first(array.shape)}")
    if gray.dtype != np.uint8 and (gray.dtype != np.uint16 or gray.shape[2:] == (4,)):
        hint = "; for values in 0..1, pass (255 * image).round().astype('uint8')" * (array.dtype.kind == "f")
        raise UserError(f"an image of {array.dtype} {list(array.shape)}; expected uint8, or uint16 without "
                        f"transparency{hint}")
    if gray.ndim == 2:
        return np.ascontiguousarray(np.broadcast_to(gray[..., None], (*gray.shape, 3)))
    return np.asarray(to_rgb(Image.fromarray(gray))) if gray.shape[2] == 4 else gray
