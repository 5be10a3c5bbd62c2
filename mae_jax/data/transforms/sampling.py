"""Locations of a training view's pixels in the stored image, for data.resize=graph.

The draws are those of `crop.augment`, in the same order: a position has the same box and flip in both.
"""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.transforms import crop

SUPPORT = 2.0  # half width of the bicubic filter, in pixels of the view, or of the stored image if it is enlarged
CONTEXT = 2  # pixels around those read, from which the JPEG decoder interpolates colors at the edges
MARGIN = 2.0  # times the target's size that a part keeps after the decoder shrinks it; our choice
RATIOS = (1, 2, 4, 8)  # factors by which the decoder can shrink


class Axis(NamedTuple):
    """One direction of a view; lengths are in pixels of the stored image."""

    centers: np.ndarray  # float64 [n], of the n rows or columns of the view
    scale: float  # distance between neighboring centers
    low: int  # the first row or column that the filter may read
    high: int  # one past the last

    def shrunk(self, ratio: int) -> "Axis":
        """Returns the axis in an image that the decoder has shrunk."""
        return Axis(self.centers / ratio, self.scale / ratio, self.low // ratio, -(-self.high // ratio))

    def window(self, size: int) -> tuple[int, int]:
        """Returns the first index and the length of the part of the image's `size` rows or columns to decode."""
        reach = SUPPORT * max(self.scale, 1.0)
        first = max(self.low, int(self.centers.min() - reach)) - CONTEXT
        last = min(self.high, int(self.centers.max() + reach) + 1) + CONTEXT
        return max(first, 0), min(last, size) - max(first, 0)


def draw(rng: np.random.Generator, size: tuple[int, int], config: ConfigDict) -> tuple[Axis, Axis]:
    """Draws the rows and columns of a view by data.augment and data.flip.

    Args:
      size: height, width of the stored image.
    """
    data, target = config.data, tuple(config.data.image_size)
    if data.augment == "simple":
        rows, columns, scales = crop.simple_places(size, target, rng.random(), rng.random())
        axes = [Axis((which + 0.5) * scale, scale, 0, whole)
                for which, scale, whole in zip((rows, columns), scales, size, strict=True)]
    elif data.augment in ("none", "fixed"):
        place = (0.5, 0.5) if data.augment == "none" else (rng.random(), rng.random())
        left, top, right, bottom = crop.covering_box(size, target, config.eval.crop_ratio[0], *place)
        axes = [_even(top, bottom, target[0], 0, size[0]), _even(left, right, target[1], 0, size[1])]
    else:
        box = crop.draw_box(rng, size, data)
        bottom, right = box.top + box.height, box.left + box.width
        axes = [_even(box.top, bottom, target[0], box.top, bottom), _even(box.left, right, target[1], box.left, right)]
    if data.flip and data.augment != "none" and rng.random() < 0.5:
        axes[1] = axes[1]._replace(centers=axes[1].centers[::-1])
    return axes[0], axes[1]


def ratio(rows: Axis, columns: Axis) -> int:
    """Returns the largest factor by which the decoder may shrink the image: MARGIN times the target's size remains."""
    return max(each for each in RATIOS if each == 1 or min(rows.scale, columns.scale) >= MARGIN * each)


def _even(first: float, last: float, count: int, low: int, high: int) -> Axis:
    scale = (last - first) / count
    return Axis(first + (np.arange(count) + 0.5) * scale, scale, low, high)
