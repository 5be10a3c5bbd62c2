"""Looks, before a run, whether the anchors of a detector fit the objects of the training split."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.identity import sampled
from mae_jax.data.transforms.detection import evaluation_placement
from mae_jax.ops.detection.anchors import anchors

log = logging.getLogger(__name__)


def warn(part: Any, config: ConfigDict) -> None:
    """Logs a warning if anchors of no size fit most objects of the split, and sizes that do; looks at 64 images.

    Args:
      part: the training split, a Source with `annotations`.
      config: of a run of method.name=detection.
    """
    m, canvas = config.method, " x ".join(map(str, config.data.image_size))
    found = [truth.objects for truth in map(part.annotations.truth, map(int, sampled(part.size)))]
    boxes = np.concatenate([evaluation_placement(each.size, config).boxes(each.box[~each.crowd]) for each in found])
    sides = boxes[:, 2:] - boxes[:, :2]
    sides = sides[(sides > 0).all(1)]
    least = min(m.anchor_overlaps)
    missed = np.mean(best_overlaps(sides, m.anchor_sizes, m.anchor_ratios) < least) if len(sides) else 0.0
    if missed <= 0.5:
        return
    low, middle, high = np.quantile(np.sqrt(sides.prod(1)), (0.1, 0.5, 0.9))
    maps = len(m.anchor_sizes)
    half = 2.0 ** ((maps - 1) / 2)  # sizes of neighboring maps differ by two or more, as usual
    sizes = np.geomspace(min(low, middle / half), max(high, middle * half), maps).round(1)
    log.warning("%.0f %% of the objects of data.train_split=%r overlap no anchor by %g, even one at their place: on a "
                "canvas of %s pixels they are %.0f to %.0f pixels large (the middle %.0f), and "
                "method.anchor_sizes=%s. Such sizes would fit: --config.method.anchor_sizes='(%s)'", 100 * missed,
                config.data.train_split, least, canvas, low, high, middle, tuple(m.anchor_sizes),
                ",".join(map(str, sizes)))


def best_overlaps(sides: np.ndarray, sizes: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    """Returns the largest IoU of each object with an anchor of the same center, float32 [n].

    Args:
      sides: width and height of the objects, float [n, 2].
      sizes: square roots of the anchors' areas.
      ratios: height / width of the anchors.
    """
    from mae_jax.ops.detection.boxes import iou  # not above, since worker processes do without JAX

    centered = np.concatenate([-sides, sides], 1) / 2
    return np.asarray(iou(centered, np.concatenate(anchors((1, 1), [1] * len(sizes), sizes, ratios)))).max(1)
