"""Converts polygons to masks, by pycocotools if it is installed (extra `coco`), else by scikit-image.

pycocotools draws outlines on a five times finer grid, and rounds; scikit-image takes the pixels with centers inside.
"""

import functools
import math
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from mae_jax.data import rle
from mae_jax.data.objects import Region


@functools.cache
def routine() -> ModuleType | None:
    """Returns pycocotools.mask, or None if it is not installed."""
    try:
        from pycocotools import mask
    except ImportError:
        return None
    return mask


def region(polygons: Sequence[np.ndarray], box: np.ndarray) -> Region:
    """Returns the mask of an object.

    Args:
      polygons: its parts, float [2 k] each: x0, y0, x1, y1, ... in pixels of the image.
      box: the box around the object, inside the image, float [4].
    """
    left, top = math.floor(box[0]), math.floor(box[1])
    width, height = max(math.ceil(box[2]) - left, 1), max(math.ceil(box[3]) - top, 1)
    moved = [(part.reshape(-1, 2) - (left, top)) for part in polygons]
    values = _coco(moved, height, width) if routine() else _centers(moved, height, width)
    if not values.any():  # too thin to cover any pixel: take the whole box
        values[:] = True
    return Region(left, top, values)


def _coco(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    coco = routine()
    assert coco is not None
    parts = coco.frPyObjects([part.ravel().astype(np.float64).tolist() for part in polygons], height, width)
    # pycocotools' own decode warns with NumPy 2.
    return rle.decoded(rle.runs(coco.merge(parts)["counts"], (height, width)), (height, width))


def _centers(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    from skimage.draw import polygon

    mask = np.zeros((height, width), bool)
    for part in polygons:
        mask[polygon(part[:, 1] - 0.5, part[:, 0] - 0.5, mask.shape)] = True
    return mask
