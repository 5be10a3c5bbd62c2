"""Anchors of a region proposal network: reference boxes at each cell of each map of a feature pyramid."""

from collections.abc import Sequence

import numpy as np


def anchors(image: tuple[int, int], strides: Sequence[int], sizes: Sequence[float],
            ratios: Sequence[float] = (0.5, 1.0, 2.0)) -> list[np.ndarray]:
    """Returns the anchors of each map of the pyramid, float32 [rows · columns · ratios, 4].

    They are ordered by row, column and ratio. The anchors of a cell are centered on its upper left corner,
    (column · stride, row · stride), as in Detectron2; RoIAlign's half-pixel offset matches this. They are neither
    rounded nor clipped.

    Args:
      image: (height, width) in pixels, padding included.
      strides: pixels per cell of each map.
      sizes: for each map, the square root of an anchor's area, in pixels.
      ratios: height / width of the anchors.
    """
    found = []
    for stride, size in zip(strides, sizes, strict=True):
        widths = size / np.sqrt(np.asarray(ratios, np.float64))
        heights = widths * np.asarray(ratios, np.float64)
        cells = np.stack([-widths, -heights, widths, heights], -1) / 2
        y, x = (np.arange(-(-side // stride)) * stride for side in image)
        corners = np.stack([*np.meshgrid(x, y)] * 2, -1)
        found.append((corners[:, :, None] + cells).reshape(-1, 4).astype(np.float32))
    return found
