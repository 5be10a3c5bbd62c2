"""Where the pixels of a training view lie in the stored image: what data.resize=graph is told of each image.

The draws are those of `crop.augment`, in its order: the same position has the same box and flip in both.
"""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.transforms import crop

SUPPORT = 2.0  # of the bicubic filter, in pixels of what is made, or of the stored image where that is enlarged
CONTEXT = 2  # pixels around what is read, from which the JPEG decoder takes the colors at its edges
MARGIN = 2.0  # how much larger than the target a part must remain that the decoder shrinks; our choice
RATIOS = (1, 2, 4, 8)  # by which it can


class Axis(NamedTuple):
    """One direction of a view; lengths are in pixels of the stored image."""

    centers: np.ndarray  # float64 [n], of the n rows or columns of the view
    scale: float  # from one of them to the next
    low: int  # the first row or column that the filter may read
    high: int  # behind the last one

    def shrunk(self, ratio: int) -> "Axis":
        """Returns the same in an image that the decoder has shrunk."""
        return Axis(self.centers / ratio, self.scale / ratio, self.low // ratio, -(-self.high // ratio))

    def window(self, size: int) -> tuple[int, int]:
        """Returns which part, first and length, of the image's `size` rows or columns is to be decoded."""
        reach = SUPPORT * max(self.scale, 1.0)
        first = max(self.low, int(self.centers.min() - reach)) - CONTEXT
        last = min(self.high, int(self.centers.max() + reach) + 1) + CONTEXT
        return max(first, 0), min(last, size) - max(first, 0)


def draw(rng: np.random.Generator, size: tuple[int, int], config: ConfigDict) -> tuple[Axis, Axis]:
    """Draws the rows and the columns of a view, as data.augment and data.flip say.

    Args:
      size: of the stored image, height and width.
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
    """Returns by how much the decoder may shrink the image: what remains is at least MARGIN times as large."""
    return max(each for each in RATIOS if each == 1 or min(rows.scale, columns.scale) >= MARGIN * each)


def _even(first: float, last: float, count: int, low: int, high: int) -> Axis:
    scale = (last - first) / count
    return Axis(first + (np.arange(count) + 0.5) * scale, scale, low, high)
