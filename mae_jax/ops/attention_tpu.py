"""Softmax attention by XLA, arranged for each generation of TPUs; used where `attention_tpu_kernel` is not."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Way(NamedTuple):
    """Arrangement of attention for one generation of TPUs.

    Attributes:
      scores: how often the product of queries and keys is computed, 1 to 3. With 3 (for the maximum, the sum and the
        weights) the scores never reach memory: XLA fuses each product with its one consumer, and barriers keep XLA from
        merging the three products. With 2, the scores are stored after the maximum is known; with 1, before.
      side_by_side: depth d of a head → S, the number of heads that share a group of lanes; 1 for other depths. Groups
        are arrays [B·H/S, T, S·d]. Separating heads that fill half the lanes would move twice the bytes. The heads of a
        group are told apart by zeros in one operand of each product, which costs the matrix unit S times the
        multiplications.
      in_place: depths of heads that are not regrouped. They stay [B, T, H, d], and the compiler chooses the layout.
      inner_by_product: for regrouped heads, True sums the products of `out` and its gradient over each head by the
        matrix unit, before the regrouping. False regroups `out` too, and XLA writes the products in float32.
    """

    scores: int
    side_by_side: dict[int, int]
    in_place: tuple[int, ...] = ()
    inner_by_product: bool = False

    def together(self, heads: int, depth: int) -> int:
        """Returns S, the number of heads per group; 1 if the number of heads is not a multiple of S."""
        count = self.side_by_side.get(depth, 1)
        return count if heads % count == 0 else 1


# Kind of device, or platform → arrangement; chosen by the compiler's estimates (benchmarks/results/tpu_step.md).
WAYS = {
    "TPU v3": Way(3, {64: 2}),
    "TPU v5 lite": Way(3, {64: 2}, in_place=(32,), inner_by_product=True),
    "TPU v6 lite": Way(3, {64: 2}, in_place=(32,), inner_by_product=True),
    "tpu": Way(3, {64: 2}),  # all other kinds, for which no other arrangement was estimated to be faster
}


def forward(way: Way, heads: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the attention [B, T, D] of q, k and v [B, T, D], and the residuals of `backward`."""
    images, tokens, width = q.shape
    given, depth = (q, k, v), width // heads
    if depth in way.in_place:
        q, k, v = (_apart(x, heads) for x in given)
        weights = _weights(_scores_in_place, way.scores, q, k)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(given[0].shape)
    else:
        together = way.together(heads, depth)
        q, k, v = (_groups(x, heads // together) for x in given)
        weights = _weights(partial(_scores, together=together, depth=depth), way.scores, q, k)
        out = _ungroup(jnp.einsum("nsqk,nskd->nqd", weights, _masked(v, together)), images)
    # Without the barrier, XLA would save the float32 values that `out` is rounded from.
    out = jax.lax.optimization_barrier(out)
    return out, (*given, weights.reshape(images, heads, tokens, tokens), out)


def backward(way: Way, heads: int, saved: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the gradients of queries, keys and values for `dout`, the gradient of the attention [B, T, D]."""
    depth = dout.shape[-1] // heads
    if depth in way.in_place:
        return _backward_in_place(heads, *saved, dout)
    return _backward_regrouped(way, heads, *saved, dout)


def _backward_regrouped(way: Way, heads: int, q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array,
                        out: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
    images, tokens, width = q.shape
    depth = width // heads
    together = way.together(heads, depth)
    if way.inner_by_product:
        inner = _inner(heads, out, dout).reshape(-1, together, tokens, 1)
        q, k, v, dout = (_groups(x, heads // together) for x in (q, k, v, dout))
        weights = weights.reshape(len(q), -1, tokens, tokens)
    else:
        q, k, v, out, dout = (_groups(x, heads // together) for x in (q, k, v, out, dout))
        out, dout = jax.lax.optimization_barrier((out, dout))  # else XLA regroups the float32 product below instead
        weights = weights.reshape(len(q), -1, tokens, tokens)
        inner = _masked(dout.astype(jnp.float32) * out, together).sum(-1, keepdims=True)
    dweights = jnp.einsum("nqd,nskd->nsqk", dout, _masked(v, together), preferred_element_type=jnp.float32)
    dscores = (weights * (dweights - inner) * depth**-0.5).astype(q.dtype)
    dq = jnp.einsum("nsqk,nskd->nqd", dscores, _masked(k, together))
    dk = jnp.einsum("nsqk,nsqd->nkd", dscores, _masked(q, together))
    dv = jnp.einsum("nsqk,nsqd->nkd", weights, _masked(dout, together))
    return _ungroup(dq, images), _ungroup(dk, images), _ungroup(dv, images)


def _backward_in_place(heads: int, q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array, out: jax.Array,
                       dout: jax.Array) -> tuple[jax.Array, ...]:
    shape = q.shape
    q, k, v, out, dout = (_apart(x, heads) for x in (q, k, v, out, dout))
    inner = (dout.astype(jnp.float32) * out).sum(-1).swapaxes(1, 2)[..., None]
    dweights = jnp.einsum("bqhd,bkhd->bhqk", dout, v, preferred_element_type=jnp.float32)
    dscores = (weights * (dweights - inner) * q.shape[-1] ** -0.5).astype(q.dtype)
    dq = jnp.einsum("bhqk,bkhd->bqhd", dscores, k)
    dk = jnp.einsum("bhqk,bqhd->bkhd", dscores, q)
    dv = jnp.einsum("bhqk,bqhd->bkhd", weights, dout)
    return dq.reshape(shape), dk.reshape(shape), dv.reshape(shape)


def _inner(heads: int, out: jax.Array, dout: jax.Array) -> jax.Array:
    """Returns Σ over each head of `out` · `dout` [B, T, D], float32 [B, H, T]."""
    of_head = np.repeat(np.eye(heads, dtype=np.float32), out.shape[-1] // heads, axis=0)
    return jnp.einsum("btd,dh->bht", dout.astype(jnp.float32) * out, of_head, precision=jax.lax.Precision.HIGHEST)


def _weights(scores: Callable[[jax.Array, jax.Array], jax.Array], times: int, q: jax.Array, k: jax.Array) -> jax.Array:
    """Returns the softmax of the scores in the dtype of q, computing `scores(q, k)` `times` times."""
    largest = scores(q, k).max(-1, keepdims=True)
    q, k, largest = _anew(times > 1, (q, k, largest))
    total = largest + jnp.log(jnp.exp(scores(q, k) - largest).sum(-1, keepdims=True))
    q, k, total = _anew(times > 2, (q, k, total))
    return jnp.exp(scores(q, k) - total).astype(q.dtype)


def _scores(q: jax.Array, k: jax.Array, together: int, depth: int) -> jax.Array:
    """Returns float32 scores [N, S, T, T] of groups [N, T, S·d]."""
    scores = jnp.einsum("nqd,nskd->nsqk", q, _masked(k, together), preferred_element_type=jnp.float32)
    return scores * depth**-0.5


def _scores_in_place(q: jax.Array, k: jax.Array) -> jax.Array:
    """Returns float32 scores [B, H, T, T] of queries and keys [B, T, H, d]."""
    return jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _anew(wanted: bool, values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Returns the values, behind a barrier if `wanted`: XLA then repeats computations on them instead of sharing them.
    """
    return jax.lax.optimization_barrier(values) if wanted else values


def _apart(x: jax.Array, heads: int) -> jax.Array:
    """Returns [B, T, H, d] for [B, T, H·d]."""
    return x.reshape(*x.shape[:2], heads, -1)


def _groups(x: jax.Array, groups: int) -> jax.Array:
    """Returns [B·H/S, T, S·d] for [B, T, H·d]."""
    images, tokens, _ = x.shape
    return x.reshape(images, tokens, groups, -1).swapaxes(1, 2).reshape(images * groups, tokens, -1)


def _ungroup(x: jax.Array, images: int) -> jax.Array:
    """Inverts `_groups`."""
    _, tokens, width = x.shape
    return x.reshape(images, -1, tokens, width).swapaxes(1, 2).reshape(images, tokens, -1)


def _masked(x: jax.Array, together: int) -> jax.Array:
    """Returns S copies [N, S, T, S·d] of x [N, T, S·d]; the s-th copy is zero outside the lanes of the s-th head."""
    if together == 1:
        return x[:, None]
    mask = np.repeat(np.eye(together), x.shape[-1] // together, axis=1)
    return x[:, None] * jnp.asarray(mask, x.dtype)[:, None]
