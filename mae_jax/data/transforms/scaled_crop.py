"""Training crops of segmentation: the image at a random size, its ratio kept, and a part of it of the model's size.

As mmsegmentation's recipes for ADE20K (Resize, RandomCrop, Pad), but that images are resized as everywhere here: by
PIL's antialiased bicubic filter. Every random choice comes from the generator that is passed in.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.decode import IGNORED, StoredImage
from mae_jax.ops.patches import MEAN

LONGEST = 4  # how much longer than its short side an image may be before the long one decides: 2048 to 512
MOST_OF_ONE = 0.75  # share of a crop's labelled pixels that one class may have (mmsegmentation's cat_max_ratio)
REDRAWS = 10  # of a crop in which one class has more
FILL = tuple(round(255 * value) for value in MEAN)  # of what the image does not cover: normalised, within 0.01 of 0
Images = tuple[Image.Image, Image.Image | None]


def scaled_size(size: tuple[int, int], short: float) -> tuple[int, int]:
    """Returns height and width of an image of a size, its short side `short` pixels and its long one LONGEST times
    that at most.
    """
    factor = min(short / min(size), LONGEST * short / max(size))
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def crop(stored: StoredImage, mask: Image.Image | None, rng: np.random.Generator, data: ConfigDict) -> Images:
    """Returns a part of the image, and of its mask, of data.image_size at most, at one of data.scales.

    Where the mask has one class in MOST_OF_ONE of its labelled pixels, or more, another part is drawn, a few times.

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
    """Says whether a mask has several classes, none of which has MOST_OF_ONE or more of the labelled pixels."""
    counts = np.bincount(mask.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return int((counts > 0).sum()) > 1 and int(counts.max()) < MOST_OF_ONE * int(counts.sum())


def pad(image: Image.Image, mask: Image.Image | None, target: tuple[int, int]) -> Images:
    """Lays an image and its mask in the top left corner of FILL, and of what is ignored, of a size (height, width)."""
    def laid(on: str, fill: Any, part: Image.Image) -> Image.Image:
        if part.size == target[::-1]:
            return part
        canvas = Image.new(on, target[::-1], fill)
        canvas.paste(part)
        return canvas

    return laid("RGB", FILL, image), mask and laid("L", IGNORED, mask)
