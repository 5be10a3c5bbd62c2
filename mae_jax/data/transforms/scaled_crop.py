"""Training crops for segmentation: the image resized to a random size, ratio kept, then cropped to the model's size.

As mmsegmentation's recipes for ADE20K (Resize, RandomCrop, Pad), except that images are resized as everywhere here, by
PIL's antialiased bicubic filter. Every random choice comes from the generator that is passed in.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.decode import IGNORED, StoredImage
from mae_jax.ops.patches import MEAN

LONGEST = 4  # ratio of the sides above which the long one sets the scale: 2048 to 512
MOST_OF_ONE = 0.75  # bound on one class's share of a crop's labeled pixels (mmsegmentation's cat_max_ratio)
REDRAWS = 10  # of a crop where one class exceeds it
FILL = tuple(round(255 * value) for value in MEAN)  # color of the padding: within 0.01 of 0 after normalization
Images = tuple[Image.Image, Image.Image | None]


def scaled_size(size: tuple[int, int], short: float) -> tuple[int, int]:
    """Returns height and width scaled to a short side of `short` pixels, but a long side of at most LONGEST · short."""
    factor = min(short / min(size), LONGEST * short / max(size))
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def crop(stored: StoredImage, mask: Image.Image | None, rng: np.random.Generator, data: ConfigDict) -> Images:
    """Returns a crop of the image and of its mask, of at most data.image_size, at a scale from data.scales.

    If one class has MOST_OF_ONE or more of the crop's labeled pixels, the crop is redrawn, up to REDRAWS times.

    Raises:
      BadImage: the pixels do not decode.
    """
    target: tuple[int, int] = tuple(data.image_size)
    size = scaled_size((stored.height, stored.width), rng.uniform(*data.scales) * min(target))
    part = min(size[0], target[0]), min(size[1], target[1])

    def draw() -> tuple[int, int]:
        down, right = (int(rng.integers(whole - cut + 1)) for whole, cut in zip(size, part, strict=True))
        return down, right

    whole_mask = mask and mask.resize(size[::-1], Image.Resampling.NEAREST)
    top, left = draw()
    for _ in range(REDRAWS if whole_mask else 0):
        if is_varied(np.asarray(whole_mask.crop((left, top, left + part[1], top + part[0])))):
            break
        top, left = draw()
    y, x = stored.height / size[0], stored.width / size[1]
    box = (left * x, top * y, min((left + part[1]) * x, stored.width), min((top + part[0]) * y, stored.height))
    image = stored.whole().resize(part[::-1], Image.Resampling.BICUBIC, box)
    return image, whole_mask and whole_mask.crop((left, top, left + part[1], top + part[0]))


def is_varied(mask: np.ndarray) -> bool:
    """Returns whether a mask has several classes, each with less than MOST_OF_ONE of the labeled pixels."""
    counts = np.bincount(mask.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return int((counts > 0).sum()) > 1 and int(counts.max()) < MOST_OF_ONE * int(counts.sum())


def pad(image: Image.Image, mask: Image.Image | None, target: tuple[int, int]) -> Images:
    """Pads image and mask at the bottom and right to a size (height, width), with FILL and IGNORED."""
    def laid(on: str, fill: Any, part: Image.Image) -> Image.Image:
        if part.size == target[::-1]:
            return part
        canvas = Image.new(on, target[::-1], fill)
        canvas.paste(part)
        return canvas

    return laid("RGB", FILL, image), mask and laid("L", IGNORED, mask)
