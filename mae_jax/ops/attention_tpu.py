"""Softmax attention by XLA as TPUs compute it fastest, each generation in its own way, where no kernel takes it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Way(NamedTuple):
    """How a generation of chips computes attention.

    Attributes:
      scores: how often the product of queries and keys is taken. Three times (for the largest score, for the sum and
        for the weights) keeps scores out of memory: XLA fuses a product with what follows it, but not with two things
        in turn, and barriers keep it from merging the three. Twice, the scores are kept once the largest is known;
        once, they are kept at all.
      side_by_side: depth of a head → S, how many stay in one group of lanes; 1 of others. Groups are brought one after
        the other, [B·H/S, T, S·d]. To part heads of half the lanes would double what is moved; the products tell them
        apart by zeros in one operand, for which the matrix unit multiplies as many times more.
      in_place: depths of heads that are not regrouped, but stay [B, T, H, d], which the compiler lays out as the
        products like it.
      inner_by_product: of heads that are regrouped, whether the products of `out` and its gradient are summed over each
        by the matrix unit, before; else `out` is regrouped as well, and XLA writes the products in float32.
    """

    scores: int
    side_by_side: dict[int, int]
    in_place: tuple[int, ...] = ()
    inner_by_product: bool = False

    def together(self, heads: int, depth: int) -> int:
        """Returns S, how many heads of that depth stay side by side."""
        count = self.side_by_side.get(depth, 1)
        return count if heads % count == 0 else 1


# Kind of device or platform → its way, by the compiler's estimates (benchmarks/results/tpu_step.md).
WAYS = {
    "TPU v3": Way(3, {64: 2}),
    "TPU v5 lite": Way(3, {64: 2}, in_place=(32,), inner_by_product=True),
    "TPU v6 lite": Way(3, {64: 2}, in_place=(32,), inner_by_product=True),
    "tpu": Way(3, {64: 2}),  # all others, for which no other way was found to pay
}


def forward(way: Way, heads: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the attention [B, T, D], and what `backward` needs."""
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
    # Without the barrier, XLA would keep what `out` is rounded from, in float32.
    out = jax.lax.optimization_barrier(out)
    return out, (*given, weights.reshape(images, heads, tokens, tokens), out)


def backward(way: Way, heads: int, saved: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the gradients of queries, keys and values."""
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
        out, dout = jax.lax.optimization_barrier((out, dout))  # else the float32 product below is regrouped
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
    """Returns the products of `out` and its gradient [B, T, D], float32, summed over each head: [B, H, T]."""
    of_head = np.repeat(np.eye(heads, dtype=np.float32), out.shape[-1] // heads, axis=0)
    return jnp.einsum("btd,dh->bht", dout.astype(jnp.float32) * out, of_head, precision=jax.lax.Precision.HIGHEST)


def _weights(scores: Callable[[jax.Array, jax.Array], jax.Array], times: int, q: jax.Array, k: jax.Array) -> jax.Array:
    """Returns the softmax of the scores in the dtype of q; `scores` is taken so many times."""
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
    """Returns the values, from which XLA computes anew what it has computed before, where that is wanted."""
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
    """Returns [N, S, T, S·d] for [N, T, S·d]: the s-th copy has zeros in all lanes but those of the s-th head."""
    if together == 1:
        return x[:, None]
    mask = np.repeat(np.eye(together), x.shape[-1] // together, axis=1)
    return x[:, None] * jnp.asarray(mask, x.dtype)[:, None]
