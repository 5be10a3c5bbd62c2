"""Crops on the host: an image, and its mask if any, to uint8 pixels of the model's size.

Every random choice comes from the generator that is passed in. Color augmentations are in `color` and `rand_augment`.
"""

import math

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.decode import SIDEWAYS, BadImage, Box, StoredImage
from mae_jax.data.masking import ColorAugmentation, View
from mae_jax.data.transforms import scaled_crop
from mae_jax.data.transforms.color import change, policy

CROP_TRIES = 10  # torchvision's RandomResizedCrop
SIMPLE_PADDING = 4  # pixels by which a simple crop may exceed the resized image (DeiT III section 3.2)
Pixels = tuple[np.ndarray, np.ndarray | None]
Images = tuple[Image.Image, Image.Image | None]


def augment(stored: StoredImage, rng: np.random.Generator, config: ConfigDict,
            mask: np.ndarray | None = None) -> Pixels:
    """Returns a training view by data.augment, data.flip and data.color, and the same view of the mask (or None).

    'random': crop of random size and aspect ratio, resized. 'single': the same from a single draw, clipped to the image
    (linear probing). 'simple': resized to just cover the target, cropped at a random place (DeiT III). 'fixed': crop of
    fixed size at a random place. 'scaled': a part of the image at a random size, ratio kept, padded after flip and
    color (`scaled_crop`). 'none': the evaluation's center crop, never flipped.

    Args:
      mask: uint8 [height, width] of the image. It is resized by nearest neighbor; 255 where RandAugment moved the image
        away.

    Returns:
      uint8 [H, W, 3] and uint8 [H, W], of data.image_size.

    Raises:
      BadImage: the pixels do not decode, or the mask does not fit the image.
    """
    data = config.data
    image, mask = _crop(stored, mask_image(stored, mask), rng, config)
    if data.flip and data.augment != "none" and rng.random() < 0.5:
        image, mask = _flip(image), mask and _flip(mask)
    image, mask = policy(data.color)(image, rng, mask)
    return _pixels(*scaled_crop.pad(image, mask, tuple(data.image_size)))


def augment_view(stored: StoredImage, rng: np.random.Generator, view: View, colors: ColorAugmentation,
                 data: ConfigDict) -> np.ndarray:
    """Returns one crop of a method's view: a random crop, flipped half the time if data.flip, then color changes.

    Returns:
      uint8 [H, W, 3], of the view's size.

    Raises:
      BadImage: the pixels do not decode.
    """
    box = random_box(rng, (stored.height, stored.width), view.size, view.scale, data.crop_ratio)
    image = stored.view(box, view.size)
    if data.flip and rng.random() < 0.5:
        image = _flip(image)
    return np.asarray(change(image, rng, colors))


def center(stored: StoredImage, config: ConfigDict, ratio: float, mask: np.ndarray | None = None) -> Pixels:
    """Returns the evaluation's view: the central `ratio` of the image, resized, and the mask's same view (or None).

    Shapes, dtypes and errors are those of `augment`.
    """
    return _pixels(*_covering_crop(stored, mask_image(stored, mask), config.data.image_size, ratio, 0.5, 0.5))


def draw_box(rng: np.random.Generator, size: tuple[int, int], data: ConfigDict) -> Box:
    """Draws the crop of data.augment=random or single, for an image of `size` (height, width in pixels)."""
    draw = single_box if data.augment == "single" else random_box
    return draw(rng, size, tuple(data.image_size), data.crop_scale, data.crop_ratio)


def random_box(rng: np.random.Generator, size: tuple[int, int], target: tuple[int, int],
               scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Draws a crop as torchvision's RandomResizedCrop does: uniform in area, log-uniform in aspect ratio.

    Ten attempts; if no crop lies inside the image, the largest central crop of an allowed aspect ratio. `ratio` (width
    over height) is relative to the target's own, so that it bounds the distortion; for square targets, this is
    torchvision's.

    Args:
      size, target: height, width in pixels.
    """
    height, width = size
    for _ in range(CROP_TRIES):
        h, w = _draw_size(rng, size, target, scale, ratio)
        if 0 < w <= width and 0 < h <= height:
            return _draw_place(rng, size, h, w)
    shape = target[1] / target[0]
    aspect = min(max(width / height, shape * ratio[0]), shape * ratio[1])
    h, w = min(height, max(1, round(width / aspect))), min(width, max(1, round(height * aspect)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def single_box(rng: np.random.Generator, size: tuple[int, int], target: tuple[int, int],
               scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Draws a crop as BYOL does, and MAE for linear probing: `random_box` with one attempt, clipped to the image.

    Args:
      size, target: height, width in pixels.
    """
    h, w = _draw_size(rng, size, target, scale, ratio)
    return _draw_place(rng, size, min(max(h, 1), size[0]), min(max(w, 1), size[1]))


def _draw_size(rng: np.random.Generator, size: tuple[int, int], target: tuple[int, int],
               scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[int, int]:
    """Draws height and width of a crop, which may exceed the image's."""
    area = size[0] * size[1] * rng.uniform(*scale)
    aspect = target[1] / target[0] * math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def _draw_place(rng: np.random.Generator, size: tuple[int, int], h: int, w: int) -> Box:
    return Box(int(rng.integers(size[0] - h + 1)), int(rng.integers(size[1] - w + 1)), h, w)


def _crop(stored: StoredImage, mask: Image.Image | None, rng: np.random.Generator, config: ConfigDict) -> Images:
    """Crops by data.augment, to the model's image size; 'scaled' crops may be smaller."""
    data, target = config.data, tuple(config.data.image_size)
    if data.augment == "scaled":
        return scaled_crop.crop(stored, mask, rng, data)
    if data.augment == "simple":
        return _simple_crop(stored, mask, target, rng.random(), rng.random())
    if data.augment in ("none", "fixed"):
        place = (0.5, 0.5) if data.augment == "none" else (rng.random(), rng.random())
        return _covering_crop(stored, mask, target, config.eval.crop_ratio[0], *place)
    box = draw_box(rng, (stored.height, stored.width), data)
    edges = (box.left, box.top, box.left + box.width, box.top + box.height)
    return stored.view(box, target), mask and mask.resize(target[::-1], Image.Resampling.NEAREST, edges)


def _covering_crop(stored: StoredImage, mask: Image.Image | None, target: tuple[int, int], ratio: float,
                   down: float, right: float) -> Images:
    """Crops `ratio` of the largest part with the target's aspect ratio, and resizes it.

    The same as torchvision's Resize of the short side and crop of the target's size, without rounding in between: PIL's
    resize takes a box in fractions of pixels, and filters with the pixels around it.

    Args:
      down, right: position of the crop, as shares of the free space; 0.5 is the center.
    """
    box = covering_box((stored.height, stored.width), target, ratio, down, right)
    return _resize(stored, mask, target[::-1], box)


def covering_box(size: tuple[int, int], target: tuple[int, int], ratio: float, down: float,
                 right: float) -> tuple[float, float, float, float]:
    """Returns left, top, right and bottom of the crop of `_covering_crop`, for an image of `size`."""
    (rows, columns), (height, width) = size, target
    unit = min(rows / height, columns / width) * ratio
    h, w = unit * height, unit * width
    top, left = (rows - h) * down, (columns - w) * right
    return left, top, min(left + w, columns), min(top + h, rows)


def _simple_crop(stored: StoredImage, mask: Image.Image | None, target: tuple[int, int],
                 down: float, right: float) -> Images:
    """Resizes the image to just cover the target, pads 4 pixels by reflection and crops the target's size.

    For square targets, this is the simple random crop of DeiT III: torchvision's Resize of the short side and
    RandomCrop(padding=4, padding_mode='reflect'). Only the pixels of the crop are resized.

    Args:
      down, right: in [0, 1): position of the crop among the possible ones, all equally likely.
    """
    rows, columns, (y, x) = simple_places((stored.height, stored.width), target, down, right)
    (top, left), (bottom, end) = (rows.min(), columns.min()), (rows.max() + 1, columns.max() + 1)
    box = (left * x, top * y, min(end * x, stored.width), min(bottom * y, stored.height))
    images = _resize(stored, mask, (int(end - left), int(bottom - top)), box)
    inside = np.ix_(rows - top, columns - left)
    return tuple(image and Image.fromarray(np.asarray(image)[inside]) for image in images)


def simple_places(size: tuple[int, int], target: tuple[int, int], down: float, right: float
                  ) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Returns the source rows and columns of `_simple_crop`, and the size of its pixels.

    Returns:
      int [H] and int [W], indices in the resized image; (height, width) of its pixels, in pixels of the image.
    """
    height, width = _covering_size(size, target)
    rows, columns = _reflected(height, target[0], down), _reflected(width, target[1], right)
    return rows, columns, (size[0] / height, size[1] / width)


def _covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Returns height, width of the image scaled to just cover the target; rounds the long side down, as torchvision."""
    height, width = size
    if height * target[1] <= width * target[0]:
        return target[0], max(target[1], int(target[0] * width / height))
    return max(target[0], int(target[1] * height / width)), target[1]


def _reflected(size: int, target: int, share: float) -> np.ndarray:
    """Returns the rows, int [target], that a crop of `target` of `size` rows shows, with reflection at the edges."""
    first = int(share * (size + 2 * SIMPLE_PADDING - target + 1)) - SIMPLE_PADDING
    rows = np.abs(np.arange(first, first + target)) % max(2 * (size - 1), 1)  # reflection: a period of twice the steps
    return np.minimum(rows, abs(2 * (size - 1) - rows))


def _resize(stored: StoredImage, mask: Image.Image | None, size: tuple[int, int], box: tuple[float, ...]) -> Images:
    """Resizes the part in `box` (left, top, right, bottom) to `size` (width, height)."""
    image = stored.whole().resize(size, Image.Resampling.BICUBIC, box)
    return image, mask and mask.resize(size, Image.Resampling.NEAREST, box)


def _flip(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def mask_image(stored: StoredImage, mask: np.ndarray | None) -> Image.Image | None:
    """Returns the mask as a PIL image, None without one; it is rotated like the image if its shape requires it.

    Raises:
      BadImage: the mask does not have the image's size, or may or may not be rotated already.
    """
    if mask is None:
        return None
    sizes = (stored.height, stored.width), (stored.width, stored.height)
    if stored.turn is not None and (sizes[0] == sizes[1] or stored.turn not in SIDEWAYS) and mask.shape == sizes[0]:
        raise BadImage("EXIF turns it, and nothing tells whether its mask is turned already; store both upright, or "
                       "take data.exif=ignore")
    if stored.turn in SIDEWAYS and mask.shape == sizes[1]:
        return Image.fromarray(mask).transpose(stored.turn)
    if mask.shape != sizes[0]:
        raise BadImage(f"its mask has the shape {mask.shape}, not {sizes[0]}")
    return Image.fromarray(mask)


def _pixels(image: Image.Image, mask: Image.Image | None) -> Pixels:
    return np.asarray(image), None if mask is None else np.asarray(mask)
