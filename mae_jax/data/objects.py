"""The objects of an image as its source has them: boxes, classes and masks, in the image's own pixels.

Coordinates are continuous, x to the right and y down, and pixel i covers [i, i + 1): a box (x1, y1, x2, y2) is x2 - x1
wide. All are of the image as people see it, turned as its EXIF says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# The batch fields that are made of them, by `mae_jax.data.transforms.detection`.
FIELDS = ("box", "box_class", "box_valid", "box_mask", "size", "original_size")


class Region(NamedTuple):
    """A mask, cut to a rectangle of whole pixels outside of which it is 0."""

    left: int
    top: int
    values: np.ndarray  # bool [height, width]

    def whole(self, size: tuple[int, int]) -> np.ndarray:
        """Returns the mask uint8 [height, width] of an image of this size."""
        mask = np.zeros(size, np.uint8)
        height, width = self.values.shape
        mask[self.top:self.top + height, self.left:self.left + width] = self.values
        return mask


class Objects(NamedTuple):
    """The n objects of one image; B, M and the like are of batches alone."""

    size: tuple[int, int]  # height, width of the image that they are of
    box: np.ndarray  # float32 [n, 4]
    label: np.ndarray  # int32 [n], class numbers
    crowd: np.ndarray  # bool [n]: many objects at once, which nobody told apart
    area: np.ndarray  # float32 [n], of the mask in square pixels, as it was annotated
    regions: tuple[Region, ...]  # their masks


class Truth(NamedTuple):
    """What an evaluation compares with."""

    image_id: int  # as the data call the image
    objects: Objects


@dataclass(frozen=True)
class Annotations:
    """What a split with objects has besides its images.

    Attributes:
      truth: index → what is in the image, crowds too; pixels are not decoded for it.
      category_ids: as the data call the classes, in their order.
      masks: whether objects have masks; where not, boxes stand in for them.
    """

    truth: Callable[[int], Truth]
    category_ids: tuple[int, ...]
    masks: bool = True


def tight(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom of what is not 0 in [height, width]; of nothing, all 0."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(columns):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def none(size: tuple[int, int]) -> Objects:
    """Returns the objects of an image (height, width) without any."""
    return Objects(size, np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, bool),
                   np.zeros(0, np.float32), ())
