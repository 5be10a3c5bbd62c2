"""Softmax attention whose backward pass keeps little and multiplies in the dtype of the activations."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

LANES = 128  # of a TPU's vector registers and matrix unit
# Scores [..., T, T], queries then keys → bool: which keys a query may look at.
AttentionMask = Callable[[jax.Array], jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int, kept: AttentionMask | None = None) -> jax.Array:
    """Returns softmax(q kᵀ / √d) v, [B, T, D], for queries, keys and values [B, T, D] of `heads` heads.

    The softmax is float32, over the keys that are `kept` of the float32 scores; no gradient goes through that choice.
    The gradient is written out because autodiff would keep float32 weights, and multiply float32 gradients of the
    scores with bfloat16 keys and queries.
    """
    return _forward(q, k, v, heads, kept)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, heads: int,
             kept: AttentionMask | None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    anywhere = partial(_forward_anywhere, heads, kept=kept)
    branches = {"default": anywhere, "tpu": anywhere if kept else partial(_forward_on_tpu, heads)}
    out, weights, totals = jax.lax.platform_dependent(q, k, v, **branches)
    return out, (q, k, v, weights, totals, out)


def _backward(heads: int, kept: AttentionMask | None, saved: tuple[jax.Array, ...],
              dout: jax.Array) -> tuple[jax.Array, ...]:
    # Keys that were not kept have weights of zero, and so no gradient: the choice is not made again.
    anywhere = partial(_backward_anywhere, heads)
    branches = {"default": anywhere, "tpu": anywhere if kept else partial(_backward_on_tpu, heads)}
    return jax.lax.platform_dependent(*saved, dout, **branches)


attention.defvjp(_forward, _backward)


def _forward_anywhere(heads: int, q: jax.Array, k: jax.Array, v: jax.Array,
                      kept: AttentionMask | None = None) -> tuple[jax.Array, ...]:
    """Returns out, the softmax times its denominators [B, H, T, T] in the dtype of q, and those, float32 [B, T, H, 1].

    The division comes after the product with the values, where it is over [B, T, H, d] and not over [B, H, T, T].
    """
    q, k, v = (_apart(x, heads) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if kept:
        scores = jnp.where(kept(scores), scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    totals = weights.sum(-1).swapaxes(1, 2)[..., None]
    weights = weights.astype(q.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32) / totals
    return out.astype(q.dtype).reshape(*out.shape[:2], -1), weights, totals


def _backward_anywhere(heads: int, q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array, totals: jax.Array,
                       out: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
    shape = q.shape
    q, k, v, out, dout = (_apart(x, heads) for x in (q, k, v, out, dout))
    q = q * q.shape[-1] ** -0.5
    scaled = dout / totals  # float32
    inner = (scaled * out).sum(-1).swapaxes(1, 2)[..., None]
    scaled = scaled.astype(q.dtype)
    dweights = jnp.einsum("bqhd,bkhd->bhqk", scaled, v, preferred_element_type=jnp.float32)
    dscores = (weights * (dweights - inner)).astype(q.dtype)
    dq = jnp.einsum("bhqk,bkhd->bqhd", dscores, k) * q.shape[-1] ** -0.5
    dk = jnp.einsum("bhqk,bqhd->bkhd", dscores, q)
    dv = jnp.einsum("bhqk,bqhd->bkhd", weights, scaled)
    return dq.reshape(shape), dk.reshape(shape), dv.reshape(shape)


def _apart(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], heads, -1)


# On TPUs what bounds attention is the way to and from memory (benchmarks/results/tpu_step.md), so that
# - scores stay out of memory. XLA fuses a product with what follows it, but not with two things in turn: the product is
#   taken three times, for the largest score, for the sum, and for the weights. Barriers keep XLA from merging them.
# - as many heads as fill the lanes stay side by side (S heads in one group of lanes, where a head has a half of them):
#   to part them would double what is moved. The products tell them apart by zeros in one operand, which a matrix unit
#   as wide as the lanes multiplies in no time.


def _forward_on_tpu(heads: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    images, tokens, width = q.shape
    q, k, v = (_groups(x, heads) for x in (q, k, v))
    largest = _scores(q, k, width, heads).max(-1, keepdims=True)
    q, k, largest = jax.lax.optimization_barrier((q, k, largest))
    total = largest + jnp.log(jnp.exp(_scores(q, k, width, heads) - largest).sum(-1, keepdims=True))
    q, k, total = jax.lax.optimization_barrier((q, k, total))
    weights = jnp.exp(_scores(q, k, width, heads) - total).astype(q.dtype)
    out = _ungroup(jnp.einsum("nsqk,nskd->nqd", weights, _masked(v, width, heads)), images)
    # Without the barrier, XLA would keep what `out` is rounded from, in float32.
    out = jax.lax.optimization_barrier(out)
    ones = jnp.ones((images, tokens, heads, 1), jnp.float32)
    return out, weights.reshape(images, heads, tokens, tokens), ones


def _backward_on_tpu(heads: int, q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array, totals: jax.Array,
                     out: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
    images, tokens, width = q.shape
    q, k, v, out, dout = (_groups(x, heads) for x in (q, k, v, out, dout))
    out, dout = jax.lax.optimization_barrier((out, dout))  # else the float32 product below is regrouped
    weights = weights.reshape(len(q), -1, tokens, tokens)
    inner = _masked(dout.astype(jnp.float32) * out, width, heads).sum(-1, keepdims=True)
    dweights = jnp.einsum("nqd,nskd->nsqk", dout, _masked(v, width, heads), preferred_element_type=jnp.float32)
    dscores = (weights * (dweights - inner) * (width // heads) ** -0.5).astype(q.dtype)
    dq = jnp.einsum("nsqk,nskd->nqd", dscores, _masked(k, width, heads))
    dk = jnp.einsum("nsqk,nsqd->nkd", dscores, _masked(q, width, heads))
    dv = jnp.einsum("nsqk,nsqd->nkd", weights, _masked(dout, width, heads))
    return _ungroup(dq, images), _ungroup(dk, images), _ungroup(dv, images)


def _scores(q: jax.Array, k: jax.Array, width: int, heads: int) -> jax.Array:
    """Returns float32 scores [N, S, T, T] of groups [N, T, S·d]."""
    scores = jnp.einsum("nqd,nskd->nsqk", q, _masked(k, width, heads), preferred_element_type=jnp.float32)
    return scores * (width // heads) ** -0.5


def _together(width: int, heads: int) -> int:
    """Returns S, how many heads stay side by side: two of half the lanes each, else one."""
    return 2 if 2 * width == heads * LANES and heads % 2 == 0 else 1


def _groups(x: jax.Array, heads: int) -> jax.Array:
    """Returns [B·H/S, T, S·d] for [B, T, H·d]."""
    images, tokens, width = x.shape
    groups = heads // _together(width, heads)
    return x.reshape(images, tokens, groups, -1).swapaxes(1, 2).reshape(images * groups, tokens, -1)


def _ungroup(x: jax.Array, images: int) -> jax.Array:
    """Inverts `_groups`."""
    _, tokens, width = x.shape
    return x.reshape(images, -1, tokens, width).swapaxes(1, 2).reshape(images, tokens, -1)


def _masked(x: jax.Array, width: int, heads: int) -> jax.Array:
    """Returns [N, S, T, S·d] for [N, T, S·d]: the s-th copy has zeros in all lanes but those of the s-th head."""
    together = _together(width, heads)
    if together == 1:
        return x[:, None]
    mask = np.repeat(np.eye(together), x.shape[-1] // together, axis=1)
    return x[:, None] * jnp.asarray(mask, x.dtype)[:, None]
