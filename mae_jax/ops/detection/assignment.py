"""Which objects anchors and proposals are trained for: matching by overlap, and sampling of a fixed number."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

POSITIVE, NEGATIVE, NEITHER = 1, 0, -1


class Match(NamedTuple):
    """What boxes are trained for.

    Attributes:
      object: int32 [A], the object of greatest overlap, the first one of several.
      kind: int32 [A], POSITIVE, NEGATIVE or NEITHER.
    """

    object: jax.Array
    kind: jax.Array


def match(overlap: jax.Array, real: jax.Array, positive: float, negative: float, low_quality: bool,
          least: float = 0.0) -> Match:
    """Matches A boxes with M objects (1506.01497, 3.1.2).

    Args:
      overlap: IoU float32 [M, A].
      real: bool [M]; False is padding, with which nothing matches.
      positive: IoU from which a box is positive.
      negative: IoU below which it is negative; between the two it is neither.
      low_quality: whether the boxes of greatest overlap with each object, all of several, are positive too wherever
        they overlap. Each keeps its own object of greatest overlap, as in Detectron2.
      least: IoU that these must reach (MMDetection's `min_pos_iou`).
    """
    overlap = jnp.where(real[:, None], overlap, -1)
    best = overlap.max(0)
    kind = jnp.where(best >= positive, POSITIVE, jnp.where(best < negative, NEGATIVE, NEITHER))
    if low_quality:
        # An object that nothing overlaps has a greatest overlap of 0, and would make every other box positive.
        nearest = (overlap == overlap.max(1, keepdims=True)) & (overlap > 0) & (overlap >= least)
        kind = jnp.where(nearest.any(0), POSITIVE, kind)
    return Match(overlap.argmax(0).astype(jnp.int32), kind.astype(jnp.int32))


def sample(key: jax.Array, kind: jax.Array, count: int, positives: int) -> tuple[jax.Array, jax.Array]:
    """Draws boxes of one image without replacement, each kind uniformly: positives, and negatives up to the count.

    Args:
      key: of the image: the draw depends on nothing else than this and `kind`.
      kind: int32 [A], as of `Match`.
      count: how many boxes.
      positives: how many of them may be positive.

    Returns:
      Indices int32 [count], the positives first, and their kinds int32 [count]: NEITHER where there were too few.
    """
    # 31 random bits as an integer: float32 has 23, which leaves thousands of ties among 261,888 anchors.
    draw = (jax.random.bits(key, kind.shape) >> 1).astype(jnp.int32)
    found = [_first(draw, kind == POSITIVE, min(positives, count)), _first(draw, kind == NEGATIVE, count)]
    index, there = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
    used = jnp.argsort(~there, stable=True)[:count]
    return index[used], jnp.where(there[used], kind[index[used]], NEITHER)


def _first(draw: jax.Array, among: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the indices [count] of the greatest draws, and which of them are `among` the candidates."""
    size = min(count, draw.size)
    greatest, index = jax.lax.top_k(jnp.where(among, draw, -1), size)
    padding = (0, count - size)
    return jnp.pad(index, padding), jnp.pad(greatest, padding, constant_values=-1) >= 0
