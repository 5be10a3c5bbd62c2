"""Color augmentations of cropped RGB images, on the host.

Every random choice comes from the generator that is passed in. Each operation gives the same bits as torchvision on PIL
images.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from mae_jax import plugins
from mae_jax.data.masking import ColorAugmentation
from mae_jax.data.transforms.rand_augment import rand_augment

# Largest deviation of each factor from 1, and largest hue shift as a share of its circle, in either direction.
# MAE's jitter (Table 1e gives no strengths) is our choice: SimCLR's at half strength.
MAE_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
THREE_JITTER = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3}  # DeiT III Table 1 and its released recipe
DINO_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}  # DINO's released code
SOLARIZE_FROM = 128  # smallest pixel value that is inverted
BLUR = (0.1, 2.0)  # standard deviation in pixels
ENHANCE = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}


def none(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Returns the image unchanged."""
    return image


def jitter(image: Image.Image, rng: np.random.Generator, strengths: dict[str, float] = MAE_JITTER) -> Image.Image:
    """Changes brightness, contrast, saturation and hue by uniform factors, in random order (torchvision's ColorJitter).

    Args:
      strengths: largest deviation of each property, as in `MAE_JITTER`.
    """
    names, draws = tuple(strengths), rng.uniform(-1, 1, len(strengths))
    for which in rng.permutation(len(names)):
        image = adjust(image, names[which], strengths[names[which]] * draws[which])
    return image


def three(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Applies 3-Augment (DeiT III section 3.2): grayscale, solarization or blur, equally likely; then jitter."""
    change = (gray, solarize, blur)[rng.integers(3)]
    return jitter(change(image, rng), rng, THREE_JITTER)


def distort(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast, saturation and hue, each half the time (mmsegmentation's PhotoMetricDistortion).

    Brightness, by up to 32 of 255, comes first; contrast, by a factor, second or last. Saturation, by a factor, and
    hue, by up to a tenth of its circle, are changed in HSV. Values are clipped to 0 to 255 after each change.
    """
    brighter, contrasted, early, saturated, turned = rng.random(5) < 0.5
    shift, (contrast, saturation), turn = rng.uniform(-32, 32), rng.uniform(0.5, 1.5, 2), int(rng.integers(-18, 18))
    if brighter:
        image = _by_value(image, 1, shift)
    if contrasted and early:
        image = _by_value(image, contrast, 0)
    if saturated or turned:
        h, s, v = image.convert("HSV").split()
        s = _by_value(s, saturation, 0) if saturated else s
        if turned:
            h = h.point([(value + round(turn / 180 * 256)) % 256 for value in range(256)])
        image = Image.merge("HSV", (h, s, v)).convert("RGB")
    return _by_value(image, contrast, 0) if contrasted and not early else image


def _by_value(image: Image.Image, factor: float, shift: float) -> Image.Image:
    """Multiplies each value by a factor, adds a shift, and truncates to integers from 0 to 255."""
    table = (np.arange(256) * factor + shift).clip(0, 255).astype(np.uint8).tolist()
    return image.point(table * len(image.getbands()))


def adjust(image: Image.Image, name: str, amount: float) -> Image.Image:
    """Changes one property of the colors; an amount of 0 changes nothing.

    Args:
      name: 'hue', shifted by `amount` of its circle, or a key of `ENHANCE`, multiplied by 1 + amount.
    """
    if name != "hue":
        return ENHANCE[name](image).enhance(1 + amount)
    hue, saturation, value = image.convert("HSV").split()
    shift = int(amount * 255)
    return Image.merge("HSV", (hue.point([(h + shift) % 256 for h in range(256)]), saturation, value)).convert("RGB")


def gray(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Converts to grayscale (ITU-R 601 luma), in three channels."""
    return image.convert("L").convert("RGB")


def solarize(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Inverts every pixel value of at least 128."""
    return ImageOps.solarize(image, SOLARIZE_FROM)


def blur(image: Image.Image, rng: np.random.Generator, radius: tuple[float, float] = BLUR) -> Image.Image:
    """Applies a Gaussian blur whose standard deviation in pixels is uniform between the bounds `radius`."""
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(*radius)))


def change(image: Image.Image, rng: np.random.Generator, chances: ColorAugmentation) -> Image.Image:
    """Applies the color changes of a view: jitter, grayscale, blur and solarization, each with its own probability."""
    if rng.random() < chances.jitter:
        image = jitter(image, rng, DINO_JITTER)
    if rng.random() < chances.gray:
        image = gray(image, rng)
    if rng.random() < chances.blur:
        image = blur(image, rng, chances.radius)
    return solarize(image, rng) if rng.random() < chances.solarize else image


class Moving(NamedTuple):
    """A color policy that also moves pixels, and moves those of the mask with them.

    Attributes:
      change: (RGB image, generator, mask or None) → image and mask.
    """

    change: Callable[..., tuple[Image.Image, Image.Image | None]]


# data.color → a function of image and generator, or a `Moving`.
COLOR_POLICIES: dict[str, Any] = {"none": none, "jitter": jitter, "three": three, "rand": Moving(rand_augment),
                                  "distort": distort}


@functools.cache
def policy(name: str) -> Callable[..., tuple[Image.Image, Image.Image | None]]:
    """Returns the policy data.color as a function of image, generator and mask (or None) that returns image and mask.

    Raises:
      UserError: the policy is unknown.
    """
    found = plugins.find("color_policies", name, COLOR_POLICIES, "data.color")
    return found.change if isinstance(found, Moving) else lambda image, rng, mask: (found(image, rng), mask)
