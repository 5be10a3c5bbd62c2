"""Shared by digit_scenes and fashion_scenes: small things pasted on crops of photographs, with exact masks.

A scene is a function of its split and number alone. Its background is a part of a photograph of scikit-image or
scikit-learn, as in the source photo_crops: training uses the left of each, test the right. A scene has one to six
things with a longest side of 16 to 48 pixels, log-uniform. A thing is placed only where every earlier one keeps 60 % of
its pixels visible. Boxes are tight around the visible pixels. Split, size, numbers of things and the 60 % are our
choice.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from mae_jax.data import objects
from mae_jax.data.objects import Annotations, Objects, Region, Truth, tight
from mae_jax.data.sources import photo_crops
from mae_jax.data.sources.base import Example, Source, numbered_name
from mae_jax.rng import rng

SIZES = {"train": 6000, "test": 600}
SIDE = 96  # of a scene, in pixels
MOST_THINGS = 6
LENGTHS = (16, 48)  # shortest and longest of a thing's longest sides, in pixels
KEPT = 0.6  # smallest visible share of a thing's pixels
PLACES = 20  # attempts to place a thing
CROPS = 24  # backgrounds per photograph
CROP_SIDES = (96, 192)  # in pixels of the photograph; smaller if the photograph is
# The photographs in color with many things or textures; dark or plain ones make digits too easy.
WITHOUT = ("cell", "hubble_deep_field", "moon", "retina")
FIELDS = ("pixel_label", *objects.FIELDS)


class Things(NamedTuple):
    """The things to paste.

    Attributes:
      image: number → uint8 [height, width], light on black.
      labels: int [n], class numbers.
      level: gray level above which a pixel belongs to the thing.
      pasted: (part of the background uint8 [h, w, 3], resized thing uint8 [h, w], generator) → the part with the thing,
        uint8 [h, w, 3].
    """

    image: Callable[[int], np.ndarray]
    labels: np.ndarray
    level: int
    pasted: Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def source(name: str, split: str, things: Things, classes: tuple[str, ...]) -> Source:
    """Returns the scenes of a split, 'train' or 'test', with the things of that split.

    The class of a pixel is that of its thing + 1, and 0 in the background.
    """
    truth = functools.partial(_truth, name, split, things)
    return Source(SIZES[split], functools.partial(_read, name, split, things),
                  functools.partial(numbered_name, split), classes, FIELDS,
                  annotations=Annotations(truth, tuple(range(1, len(classes) + 1))))


def _read(name: str, split: str, things: Things, i: int) -> Example:
    pixels, found = scene(things, backgrounds(split), rng(0, f"{name}/{split}", i))
    mask = np.zeros(pixels.shape[:2], np.uint8)
    for label, region in zip(found.label, found.regions, strict=True):
        height, width = region.values.shape
        mask[region.top:region.top + height, region.left:region.left + width][region.values] = label + 1
    return Example(pixels, mask=mask, objects=found)


def _truth(name: str, split: str, things: Things, i: int) -> Truth:
    return Truth(i, _read(name, split, things, i).objects)


@functools.cache
def backgrounds(split: str) -> list[np.ndarray]:
    """Returns the backgrounds of a split, uint8 [96, 96, 3] each, alternating between photographs.

    Raises:
      UserError: scikit-image or scikit-learn is not installed.
    """
    chosen = [(path, label) for path, label in zip(photo_crops.paths(), photo_crops.CLASSES, strict=True)
              if label not in WITHOUT]
    photographs = [(photo_crops.photograph(path), label) for path, label in chosen]
    return [_background(photograph, split, label, k) for k in range(CROPS) for photograph, label in photographs]


def _background(photograph: np.ndarray, split: str, label: str, k: int) -> np.ndarray:
    draws = rng(0, f"scenes/{split}/{label}", k)
    first, last = photo_crops.regions(photograph.shape[1])[split]
    most = min(CROP_SIDES[1], last - first, photograph.shape[0])
    side = int(draws.integers(min(CROP_SIDES[0], most), most + 1))
    left, top = int(draws.integers(first, last - side + 1)), int(draws.integers(photograph.shape[0] - side + 1))
    part = Image.fromarray(photograph[top:top + side, left:left + side])
    return np.asarray(part.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def scene(things: Things, backgrounds: list[np.ndarray], draws: np.random.Generator) -> tuple[np.ndarray, Objects]:
    """Returns the pixels of a scene, uint8 [96, 96, 3], and its objects; later things cover earlier ones."""
    pixels = backgrounds[int(draws.integers(len(backgrounds)))].copy()
    wanted, labels = int(draws.integers(1, MOST_THINGS + 1)), []
    owner, laid = np.full((SIDE, SIDE), -1, np.int8), []  # index of the thing at each pixel; pixels of each whole thing
    for _ in range(wanted):
        number = int(draws.integers(len(things.labels)))
        thing = _resized(things.image(number), draws)
        mine, (height, width) = thing > things.level, thing.shape
        for _ in range(PLACES):
            top, left = int(draws.integers(SIDE - height + 1)), int(draws.integers(SIDE - width + 1))
            part = slice(top, top + height), slice(left, left + width)
            if _stay_in_sight(owner, laid, part, mine):
                break
        else:
            continue
        pixels[part] = things.pasted(pixels[part], thing, draws)
        owner[part][mine] = len(labels)
        laid.append(int(mine.sum()))
        labels.append(int(things.labels[number]))
    return pixels, _objects(owner, np.array(labels, np.int32))


def _resized(image: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """Crops a thing's image to its bounding box, and resizes it to a random longest side."""
    left, top, right, bottom = tight(image > 0)
    length = np.exp(draws.uniform(*np.log(LENGTHS)))
    scale = length / max(right - left, bottom - top)
    size = max(round((right - left) * scale), 1), max(round((bottom - top) * scale), 1)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, (left, top, right, bottom)))


def _stay_in_sight(owner: np.ndarray, laid: list[int], part: tuple[slice, slice], covers: np.ndarray) -> bool:
    """Returns whether every earlier thing keeps its share of visible pixels if `covers` is placed on a part."""
    covered = np.bincount(owner[part][covers].astype(np.int64) + 1, minlength=len(laid) + 1)[1:]
    left = np.bincount(owner.ravel().astype(np.int64) + 1, minlength=len(laid) + 1)[1:] - covered if laid else []
    return all(pixels >= KEPT * first for pixels, first in zip(left, laid, strict=True))


def _objects(owner: np.ndarray, labels: np.ndarray) -> Objects:
    boxes, regions, areas = [], [], []
    for number in range(len(labels)):
        mask = owner == number
        left, top, right, bottom = tight(mask)
        boxes.append((left, top, right, bottom))
        regions.append(Region(left, top, mask[top:bottom, left:right]))
        areas.append(mask.sum())
    return Objects(owner.shape, np.array(boxes, np.float32).reshape(-1, 4), labels, np.zeros(len(labels), bool),
                   np.array(areas, np.float32), tuple(regions))
