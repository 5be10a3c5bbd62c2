"""data.source=photo_mosaic: images of three parts, each from another photograph, which is the class of its pixels.

The parts are crops of the same split of the source photo_crops: no pixel is in both splits. The masks are exact. The
task is to distinguish scenes and textures; there is no foreground.
"""

import dataclasses
import functools

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.sources import photo_crops
from mae_jax.data.sources.base import Example, Source, numbered_name
from mae_jax.data.sources.splits import Split, parse
from mae_jax.rng import rng

SIZES = {"train": 2000, "test": 400}
IMAGE_SIDE = 64  # of an image, in pixels
PARTS = 3


def load(data: ConfigDict, split: Split) -> Source:
    """Opens 'train' (2000 images) or 'test' (400), or a slice."""
    crops = photo_crops.load(data, parse(split.name))
    source = Source(
        size=SIZES[split.name],
        read=functools.partial(_read, dataclasses.replace(crops, label=None), split.name),
        name=functools.partial(numbered_name, split.name),
        fields=("pixel_label",),
    )
    return source.sliced(split)


def _read(crops: Source, split: str, i: int) -> Example:
    return _mosaic(crops, rng(0, f"photo_mosaic/{split}", i))


def _mosaic(crops: Source, draws: np.random.Generator) -> Example:
    """Combines crops of three photographs: each pixel belongs to the nearest of three random points."""
    photographs = draws.permutation(len(photo_crops.CLASSES))[:PARTS]
    numbers = draws.integers(crops.size // len(photo_crops.CLASSES), size=PARTS) * len(photo_crops.CLASSES)
    layers = np.stack([_enlarged(crops.read(int(i)).image) for i in numbers + photographs])
    points = draws.uniform(0, IMAGE_SIDE, (PARTS, 2))
    part = np.square(np.indices((IMAGE_SIDE, IMAGE_SIDE)) - points[:, :, None, None]).sum(1).argmin(0)
    pixels = np.take_along_axis(layers, part[None, ..., None], 0)[0]
    return Example(np.ascontiguousarray(pixels), mask=photographs[part].astype(np.uint8))


def _enlarged(crop: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(crop).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC))
