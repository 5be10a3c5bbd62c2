"""The annotated objects of an image: boxes, classes and masks, in pixels of the image.

Coordinates are continuous, x to the right and y down, and pixel i covers [i, i + 1): a box (x1, y1, x2, y2) is x2 - x1
wide. They refer to the upright image, rotated as its EXIF says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# The batch fields that `mae_jax.data.transforms.detection` makes from objects.
FIELDS = ("box", "box_class", "box_valid", "box_mask", "size", "original_size")


class Region(NamedTuple):
    """A mask, cropped to a rectangle of whole pixels; it is 0 outside."""

    left: int
    top: int
    values: np.ndarray  # bool [height, width]

    def whole(self, size: tuple[int, int]) -> np.ndarray:
        """Returns the full mask, uint8 [height, width], for an image of `size`."""
        mask = np.zeros(size, np.uint8)
        height, width = self.values.shape
        mask[self.top:self.top + height, self.left:self.left + width] = self.values
        return mask


class Objects(NamedTuple):
    """The n objects of one image, not batched."""

    size: tuple[int, int]  # height, width of the image
    box: np.ndarray  # float32 [n, 4]
    label: np.ndarray  # int32 [n], class numbers
    crowd: np.ndarray  # bool [n]: many objects annotated as one
    area: np.ndarray  # float32 [n], annotated area of the mask in square pixels
    regions: tuple[Region, ...]  # their masks


class Truth(NamedTuple):
    """The ground truth of one image, for evaluation."""

    image_id: int  # id of the image in the data set
    objects: Objects


@dataclass(frozen=True)
class Annotations:
    """The annotations of a split with objects.

    Attributes:
      truth: index → the objects of an image, crowds included; decodes no pixels.
      category_ids: the data set's ids of the classes, in the order of the classes.
      masks: whether objects have masks; if not, boxes stand in for them.
    """

    truth: Callable[[int], Truth]
    category_ids: tuple[int, ...]
    masks: bool = True


def tight(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom of the nonzero part of a mask [height, width]; all 0 for an empty mask."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(columns):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def none(size: tuple[int, int]) -> Objects:
    """Returns the objects of an image (height, width) that has none."""
    return Objects(size, np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, bool),
                   np.zeros(0, np.float32), ())
