"""RandAugment (Cubuk et al. 2020) as in MAE's fine-tuning: timm's policy 'rand-m9-mstd0.5-inc1'.

An operation takes an amount between -1 and 1: its absolute value is the strength (magnitude / 10), its sign the
direction. Most strengths are near 0.9. 'Increasing' operations change more with more strength.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

OPERATIONS = 2  # drawn per image, with replacement
PROBABILITY = 0.5  # that a drawn operation is applied
MAGNITUDE, DEVIATION, HIGHEST = 9, 0.5, 10
DEGREES, SHEAR, SHIFT = 30, 0.3, 0.45  # at full strength; the shift in shares of the side
FILL = (124, 116, 104)  # ImageNet's mean color, where an image was moved away
IGNORED = 255  # the same for a mask


def rand_augment(image: Image.Image, rng: np.random.Generator,
                 mask: Image.Image | None = None) -> tuple[Image.Image, Image.Image | None]:
    """Applies up to two operations to an RGB image, and moves the classes in `mask` (if any) with its pixels."""
    for name, amount in draw(rng):
        image, mask = apply(image, name, amount, mask)
    return image, mask


def draw(rng: np.random.Generator) -> list[tuple[str, float]]:
    """Draws the name and amount of each operation to apply: none, one or two."""
    drawn = []
    for which in rng.integers(len(NAMES), size=OPERATIONS):
        applied, strength, sign = rng.random() < PROBABILITY, rng.normal(MAGNITUDE, DEVIATION), rng.choice((-1, 1))
        if applied:
            drawn.append((NAMES[which], sign * min(max(strength, 0), HIGHEST) / HIGHEST))
    return drawn


def apply(image: Image.Image, name: str, amount: float,
          mask: Image.Image | None = None) -> tuple[Image.Image, Image.Image | None]:
    """Applies one operation; the module docstring defines `amount`."""
    if name in COLORS:
        return COLORS[name](image, amount), mask
    move = MOVES[name]
    image = move(image, amount, resample=Image.Resampling.BICUBIC, fillcolor=FILL)
    return image, mask and move(mask, amount, resample=Image.Resampling.NEAREST, fillcolor=IGNORED)


def _enhance(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    """Returns an operation that blends with the degraded image of PIL's enhancer, or away from it."""
    return lambda image, amount: kind(image).enhance(1 + 0.9 * amount)


def _posterize(image: Image.Image, amount: float) -> Image.Image:
    """Keeps the 4 highest bits or fewer; at full strength none: a black image, which newer Pillow versions refuse."""
    dropped = 4 + int(4 * abs(amount))
    return image.point([value >> dropped << dropped for value in range(256)] * 3)


def _solarize(image: Image.Image, amount: float) -> Image.Image:
    """Inverts values at or above a threshold that falls with the strength."""
    return ImageOps.solarize(image, 256 - int(256 * abs(amount)))


def _solarize_add(image: Image.Image, amount: float) -> Image.Image:
    """Brightens values below 128."""
    add = int(110 * abs(amount))
    return image.point([min(value + add, 255) if value < 128 else value for value in range(256)] * 3)


def _affine(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Callable[..., Image.Image]:
    """Returns an affine transform; `matrix` maps amount, width and height to PIL's coefficients, output to input."""
    return lambda image, amount, **how: image.transform(
        image.size, Image.Transform.AFFINE, matrix(amount, *image.size), **how)


COLORS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto_contrast": lambda image, amount: ImageOps.autocontrast(image),
    "equalize": lambda image, amount: ImageOps.equalize(image),
    "invert": lambda image, amount: ImageOps.invert(image),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
}
MOVES: dict[str, Callable[..., Image.Image]] = {
    "rotate": lambda image, amount, **how: image.rotate(DEGREES * amount, **how),
    "shear_x": _affine(lambda amount, width, height: (1, SHEAR * amount, 0, 0, 1, 0)),
    "shear_y": _affine(lambda amount, width, height: (1, 0, 0, SHEAR * amount, 1, 0)),
    "translate_x": _affine(lambda amount, width, height: (1, 0, SHIFT * amount * width, 0, 1, 0)),
    "translate_y": _affine(lambda amount, width, height: (1, 0, 0, 0, 1, SHIFT * amount * height)),
}
NAMES = (*COLORS, *MOVES)
