"""Geometry and colour on the host: a picture to uint8 pixels of the model's size.

Every random choice comes from the generator that is passed in.
"""

import math

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance

from mae_jax.data.decode import Box, Picture

CROP_TRIES = 10  # torchvision's RandomResizedCrop
# Strengths of the colour jitter are our choice (MAE Table 1e gives none): SimCLR's at half strength.
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.1


def augment(picture: Picture, rng: np.random.Generator, config: ConfigDict) -> np.ndarray:
    """Returns a training view, uint8 [height, width, 3] of data.image_size, as data.augment and data.colour say.

    'random': crop of random size and shape, resized, flipped. 'fixed': crop of fixed size at a random place, flipped.
    'none': the evaluation's centre crop.

    Raises:
      BadPicture: the pixels do not decode.
    """
    data, ratio = config.data, config.eval.crop_ratio[0]
    if data.augment == "none":
        return centre(picture, config, ratio)
    if data.augment == "fixed":
        image = _covering_crop(picture, data.image_size, ratio, rng.random(), rng.random())
    else:
        target = tuple(data.image_size)
        box = random_box(rng, (picture.height, picture.width), target, data.crop_scale, data.crop_ratio)
        image = picture.view(box, target)
    if data.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(jitter(image, rng) if data.colour == "jitter" else image)


def centre(picture: Picture, config: ConfigDict, ratio: float) -> np.ndarray:
    """Returns the evaluation's view, uint8 [height, width, 3]: the central `ratio` of the picture, resized."""
    return np.asarray(_covering_crop(picture, config.data.image_size, ratio, 0.5, 0.5))


def random_box(rng: np.random.Generator, size: tuple[int, int], target: tuple[int, int],
               scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Draws a crop as torchvision's RandomResizedCrop does: uniform in area, log-uniform in shape.

    Ten draws; if none lies inside the picture, the largest central crop of an allowed shape. `ratio` (width over
    height) is relative to the target's own, so that it bounds the distortion; for square targets that is torchvision's.

    Args:
      size, target: height, width in pixels.
    """
    height, width = size
    shape = target[1] / target[0]
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = shape * math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
    aspect = min(max(width / height, shape * ratio[0]), shape * ratio[1])
    h, w = min(height, max(1, round(width / aspect))), min(width, max(1, round(height * aspect)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast, saturation and hue by random factors, in random order (as torchvision's)."""
    strengths = rng.uniform(-1, 1, 4)
    for which in rng.permutation(4):
        if which == 3:
            image = _shift_hue(image, HUE * strengths[3])
        else:
            enhance, most = ((ImageEnhance.Brightness, BRIGHTNESS), (ImageEnhance.Contrast, CONTRAST),
                             (ImageEnhance.Color, SATURATION))[which]
            image = enhance(image).enhance(1 + most * strengths[which])
    return image


def _shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turns the hue circle by `turn` of its full length."""
    hue, saturation, value = image.convert("HSV").split()
    shift = round(turn * 255)
    return Image.merge("HSV", (hue.point(lambda h: (h + shift) % 256), saturation, value)).convert("RGB")


def _covering_crop(picture: Picture, target: tuple[int, int], ratio: float, down: float, right: float) -> Image.Image:
    """Cuts `ratio` of the largest part that has the target's shape, and resizes it.

    The same as torchvision's Resize of the short side and crop of the target's size, with no rounding between the two:
    PIL's resize takes a box in fractions of pixels and filters with what lies around it.

    Args:
      down, right: where the crop lies, in shares of the free space; 0.5 is the middle.
    """
    height, width = target
    unit = min(picture.height / height, picture.width / width) * ratio
    h, w = unit * height, unit * width
    top, left = (picture.height - h) * down, (picture.width - w) * right
    box = (left, top, min(left + w, picture.width), min(top + h, picture.height))
    return picture.whole().resize((width, height), Image.Resampling.BICUBIC, box=box)
