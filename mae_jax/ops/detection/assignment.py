"""Assignment of training targets to anchors and proposals: matching by IoU, and sampling of a fixed number of boxes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

POSITIVE, NEGATIVE, NEITHER = 1, 0, -1


class Match(NamedTuple):
    """Assignment of A boxes to objects.

    Attributes:
      object: int32 [A], the object with the greatest IoU; the first one among equals.
      kind: int32 [A], POSITIVE, NEGATIVE or NEITHER.
    """

    object: jax.Array
    kind: jax.Array


def match(overlap: jax.Array, real: jax.Array, positive: float, negative: float, low_quality: bool,
          least: float = 0.0) -> Match:
    """Matches A boxes with M objects (arXiv 1506.01497, section 3.1.2).

    Args:
      overlap: IoU float32 [M, A].
      real: bool [M]; False marks padding, which never matches.
      positive: boxes with at least this IoU are positive.
      negative: boxes below this IoU are negative; boxes between the two thresholds are neither.
      low_quality: whether the boxes with the greatest IoU of each object (all, if several are equal) are positive too,
        if it is above 0. Each is still assigned to its own object with the greatest IoU, as in Detectron2.
      least: minimum IoU of such boxes (MMDetection's `min_pos_iou`).
    """
    overlap = jnp.where(real[:, None], overlap, -1)
    best = overlap.max(0)
    kind = jnp.where(best >= positive, POSITIVE, jnp.where(best < negative, NEGATIVE, NEITHER))
    if low_quality:
        # The greatest IoU of an object without overlapping boxes is 0: without `> 0`, it would make all boxes positive.
        nearest = (overlap == overlap.max(1, keepdims=True)) & (overlap > 0) & (overlap >= least)
        kind = jnp.where(nearest.any(0), POSITIVE, kind)
    return Match(overlap.argmax(0).astype(jnp.int32), kind.astype(jnp.int32))


def sample(key: jax.Array, kind: jax.Array, count: int, positives: int) -> tuple[jax.Array, jax.Array]:
    """Samples boxes of one image without replacement, uniformly within positives and within negatives.

    Args:
      key: of the image; the draw depends only on it and `kind`.
      kind: int32 [A], as in `Match`.
      count: number of boxes to sample; negatives fill up what positives leave.
      positives: most positives to sample.

    Returns:
      Indices int32 [count], positives first, and their kinds int32 [count]; NEITHER marks padding if boxes are too few.
    """
    # Integers of 31 random bits: a float32 draw has 23 bits, and thousands of ties among 261,888 anchors.
    draw = (jax.random.bits(key, kind.shape) >> 1).astype(jnp.int32)
    found = [_first(draw, kind == POSITIVE, min(positives, count)), _first(draw, kind == NEGATIVE, count)]
    index, there = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
    used = jnp.argsort(~there, stable=True)[:count]
    return index[used], jnp.where(there[used], kind[index[used]], NEITHER)


def _first(draw: jax.Array, among: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the indices [count] of the candidates `among` with the greatest draws, and bool [count]: which exist."""
    size = min(count, draw.size)
    greatest, index = jax.lax.top_k(jnp.where(among, draw, -1), size)
    padding = (0, count - size)
    return jnp.pad(index, padding), jnp.pad(greatest, padding, constant_values=-1) >= 0
