"""Homologous attention (MixedAE, arXiv 2303.17152): masks of the keys that a query of a mixed sequence attends to.

A mixed sequence has T tokens: an optional class token, then N patches. Each run of N / G consecutive patches comes from
one of the G images of a group.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops.normalization import unit

BITS = 32  # bits of a score
LOWEST = np.iinfo(np.int32).min


def sources(patches: int, group: int) -> np.ndarray:
    """Returns the index in its group of the image that each patch of a mixed sequence comes from, int [N]."""
    return np.arange(patches) // (patches // group)


def same_source(patches: int, group: int) -> np.ndarray:
    """Returns which pairs of patches of a mixed sequence come from the same image, bool [N, N]."""
    source = sources(patches, group)
    return source[:, None] == source


@dataclass(frozen=True)
class TopKMask:
    """Keeps the K patches with the largest scores for each query and head; all patches tied with the K-th are kept.

    The key of the class token is always kept, and the query of the class token keeps all keys.
    """

    keep: int  # K
    patches: int  # N

    def __call__(self, scores: jax.Array) -> jax.Array:
        """Returns bool [..., T, T] for float32 scores [..., T, T] (queries, keys)."""
        first = scores.shape[-1] - self.patches
        free = jnp.arange(scores.shape[-1]) < first
        threshold = kth_largest(jnp.where(free, -jnp.inf, scores), self.keep)
        return (scores >= threshold) | free | free[:, None]


@dataclass(frozen=True)
class OracleMask:
    """Keeps the patches of the query's own image, known from the mixing; the class token as in `TopKMask`."""

    group: int  # G
    patches: int  # N

    def __call__(self, scores: jax.Array) -> jax.Array:
        """Returns bool [T, T] for scores [..., T, T], of which it reads only the shape."""
        first = scores.shape[-1] - self.patches
        same = same_source(self.patches, self.group)
        return jnp.asarray(np.pad(same, ((first, 0), (first, 0)), constant_values=True))


def kth_largest(values: jax.Array, k: int) -> jax.Array:
    """Returns the exact k-th largest value of each row of float32 [..., T], as [..., 1].

    CPUs and TPUs use bisection, GPUs sort. On CPUs bisection is the fastest; on GPUs sorting takes a quarter of its
    time (`benchmarks/top_k.py`). TPUs were not timed.
    """
    bisected = partial(_bisected, k)
    return jax.lax.platform_dependent(values, cpu=bisected, tpu=bisected, default=partial(_sorted, k))


def _sorted(k: int, values: jax.Array) -> jax.Array:
    """Sorts the bits as integers: devices may flush subnormal floats to zero."""
    found = jnp.sort(_in_order(values), -1)[..., -k, None]
    return jax.lax.bitcast_convert_type(_flipped(found), jnp.float32)


def _bisected(k: int, values: jax.Array) -> jax.Array:
    """Finds the k-th largest value bit by bit, on integers that are ordered as the floats are.

    Each of 32 passes counts the values of a row that are at least the candidate.
    """
    ordered = _in_order(values)

    def add_bit(number: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found ^ jnp.left_shift(jnp.int32(1), BITS - 1 - number)  # pass 0 clears the sign bit
        reached = (ordered >= candidate).sum(-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(reached >= k, candidate, found)

    # The lowest integer is a valid start: all values are at least as large.
    found = jax.lax.fori_loop(0, BITS, add_bit, jnp.full((*values.shape[:-1], 1), LOWEST, jnp.int32))
    return jax.lax.bitcast_convert_type(_flipped(found), jnp.float32)


def _in_order(values: jax.Array) -> jax.Array:
    """Returns int32 [...] that are ordered as the float32 values are, except that -0 is below 0."""
    return _flipped(jax.lax.bitcast_convert_type(values, jnp.int32))


def _flipped(bits: jax.Array) -> jax.Array:
    """Reverses the order of the bit patterns of negative floats; its own inverse."""
    return jnp.where(bits < 0, bits ^ jnp.int32(~LOWEST), bits)


def purity(scores: jax.Array, keep: int, group: int, patches: int) -> jax.Array:
    """Returns the share of each query's kept patches that come from the query's own image, float32 [B, H, N].

    Args:
      scores: attention scores float32 [B, H, T, T] of one block.
      keep: K of `TopKMask`.
      group: G, the images in a mixed sequence; a random choice of keys has an expected purity of 1 / G.
      patches: N.
    """
    scores = scores[..., -patches:, -patches:]
    kept = TopKMask(keep, patches)(scores)
    return (kept & same_source(patches, group)).sum(-1) / kept.sum(-1)


def neighbor_homology(tokens: jax.Array, group: int) -> jax.Array:
    """Returns the share of tokens whose nearest neighbor by cosine comes from the same image, float32 [B].

    Args:
      tokens: of the patches, [B, N, D].
      group: G, the images in a mixed sequence.
    """
    tokens = unit(tokens.astype(jnp.float32))
    alike = jnp.einsum("bnd,bmd->bnm", tokens, tokens, precision="highest")
    count = tokens.shape[1]
    nearest = jnp.where(jnp.eye(count, dtype=bool), -jnp.inf, alike).argmax(-1)
    source = jnp.asarray(sources(count, group))
    return (source[nearest] == source).mean(-1)
