"""Homologous attention (MixedAE, arXiv 2303.17152): which keys of a mixed sequence a query looks at.

A mixed sequence has T tokens: a class token, where there is one, then N patches, of which each N / G neighbours come
from the same image.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops.normalization import unit

BITS = 32  # of a score
LOWEST = np.iinfo(np.int32).min


def sources(patches: int, group: int) -> np.ndarray:
    """Returns which image of a group each patch of a mixed sequence comes from, int [N]."""
    return np.arange(patches) // (patches // group)


def same_source(patches: int, group: int) -> np.ndarray:
    """Returns bool [N, N]: which patches of a mixed sequence come from one image."""
    source = sources(patches, group)
    return source[:, None] == source


@dataclass(frozen=True)
class TopKMask:
    """Keeps, for each query and head, the patches whose score is at least the K-th largest; ties are all kept.

    The class token's key is always kept, and its query sees all keys.
    """

    keep: int
    patches: int

    def __call__(self, scores: jax.Array) -> jax.Array:
        """Returns bool [..., T, T] for float32 scores [..., T, T]: queries, then keys."""
        first = scores.shape[-1] - self.patches
        free = jnp.arange(scores.shape[-1]) < first
        threshold = kth_largest(jnp.where(free, -jnp.inf, scores), self.keep)
        return (scores >= threshold) | free | free[:, None]


@dataclass(frozen=True)
class OracleMask:
    """Keeps the patches of the query's own image, which only the mixing knows; the class token as in `TopKMask`."""

    group: int
    patches: int

    def __call__(self, scores: jax.Array) -> jax.Array:
        """Returns bool [T, T] for scores [..., T, T]."""
        first = scores.shape[-1] - self.patches
        same = same_source(self.patches, self.group)
        return jnp.asarray(np.pad(same, ((first, 0), (first, 0)), constant_values=True))


def kth_largest(values: jax.Array, k: int) -> jax.Array:
    """Returns the k-th largest of each row of float32 [..., T], as [..., 1]; exactly.

    By bisection on CPUs, where no sort is as fast, and on TPUs, where no way was timed; by sorting on GPUs, where a
    sort of floats takes a quarter of this loop's time (`benchmarks/top_k.py`).
    """
    bisected = partial(_bisected, k)
    return jax.lax.platform_dependent(values, cpu=bisected, tpu=bisected, default=partial(_sorted, k))


def _sorted(k: int, values: jax.Array) -> jax.Array:
    """Sorts integers, which devices do not flush to zero."""
    found = jnp.sort(_in_order(values), -1)[..., -k, None]
    return jax.lax.bitcast_convert_type(_flipped(found), jnp.float32)


def _bisected(k: int, values: jax.Array) -> jax.Array:
    """Finds it bit by bit: the bits of a float, put in order as integers, are larger where the float is.

    Each of 32 passes counts how many values of the row reach a candidate.
    """
    ordered = _in_order(values)

    def add_bit(number: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found ^ jnp.left_shift(jnp.int32(1), BITS - 1 - number)  # the first bit is the sign: the rest add
        reached = (ordered >= candidate).sum(-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(reached >= k, candidate, found)

    # As many values as there are reach the lowest number.
    found = jax.lax.fori_loop(0, BITS, add_bit, jnp.full((*values.shape[:-1], 1), LOWEST, jnp.int32))
    return jax.lax.bitcast_convert_type(_flipped(found), jnp.float32)


def _in_order(values: jax.Array) -> jax.Array:
    """Returns int32 [...] that compare as float32 values do, but that -0 is below 0."""
    return _flipped(jax.lax.bitcast_convert_type(values, jnp.int32))


def _flipped(bits: jax.Array) -> jax.Array:
    """Reverses the order of negative floats' bits, or puts it back."""
    return jnp.where(bits < 0, bits ^ jnp.int32(~LOWEST), bits)


def purity(scores: jax.Array, keep: int, group: int, patches: int) -> jax.Array:
    """Returns the share of the kept patches that come from the query's image, float32 [B, H, N], of every query.

    Args:
      scores: float32 [B, H, T, T] of one block.
      keep: K.
      group: G, images in a mixed sequence; by chance it is 1 / G.
      patches: N.
    """
    scores = scores[..., -patches:, -patches:]
    kept = TopKMask(keep, patches)(scores)
    return (kept & same_source(patches, group)).sum(-1) / kept.sum(-1)


def neighbor_homology(tokens: jax.Array, group: int) -> jax.Array:
    """Returns the share of tokens [B, N, D] whose nearest other one, by cosine, is of the same image: float32 [B]."""
    tokens = unit(tokens.astype(jnp.float32))
    alike = jnp.einsum("bnd,bmd->bnm", tokens, tokens, precision="highest")
    count = tokens.shape[1]
    nearest = jnp.where(jnp.eye(count, dtype=bool), -jnp.inf, alike).argmax(-1)
    source = jnp.asarray(sources(count, group))
    return (source[nearest] == source).mean(-1)
