"""Softmax attention whose backward pass keeps little and multiplies in the dtype of the activations."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def attention(qkv: jax.Array, heads: int) -> jax.Array:
    """Returns softmax(q kᵀ / √d) v, [B, T, D], for queries, keys and values [B, T, 3, D] of `heads` heads.

    The softmax is float32. The gradient is written out because autodiff would keep float32 weights, and multiply
    float32 gradients of the scores with bfloat16 keys and queries.
    """
    return _forward(qkv, heads)[0]


def _forward(qkv: jax.Array, heads: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    q, k, v = _split_heads(qkv, heads)
    q = q * q.shape[-1] ** -0.5
    q, k, weights, totals = jax.lax.platform_dependent(q, k, tpu=_weights_on_tpu, default=_weights)
    out = jnp.einsum("nqk,nkd->nqd", weights, v, preferred_element_type=jnp.float32) / totals
    # Without the barrier, XLA would keep what `out` is rounded from, in float32.
    out = jax.lax.optimization_barrier(_join_heads(out.astype(q.dtype), heads))
    return out, (q, k, v, weights, totals, out)


def _weights(q: jax.Array, k: jax.Array) -> tuple[jax.Array, ...]:
    """Returns q and k, the softmax times its denominators [N, T, T] in the dtype of q, and those, float32 [N, T, 1].

    The division is left to the caller: over [N, T, d] after the product with the values it is the smaller work.
    """
    scores = _scores(q, k)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return q, k, weights.astype(q.dtype), weights.sum(-1, keepdims=True)


def _weights_on_tpu(q: jax.Array, k: jax.Array) -> tuple[jax.Array, ...]:
    """Does the same with scores that never reach memory: what is reduced or rounded is computed inside the product.

    XLA fuses a product with what follows it, but not with two things in turn. So the product is taken three times, for
    the maximum, for the logarithm of the sum, and for the weights; barriers keep XLA from merging them again. For
    ViT-L's decoder the scores are six times as large as the tokens, the products a fiftieth of the work.
    """
    largest = _scores(q, k).max(-1, keepdims=True)
    q, k, largest = jax.lax.optimization_barrier((q, k, largest))
    total = largest + jnp.log(jnp.exp(_scores(q, k) - largest).sum(-1, keepdims=True))
    q, k, total = jax.lax.optimization_barrier((q, k, total))
    weights = jnp.exp(_scores(q, k) - total).astype(q.dtype)
    return q, k, weights, jnp.ones_like(total)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("nqd,nkd->nqk", q, k, preferred_element_type=jnp.float32)


def _backward(heads: int, saved: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array]:
    q, k, v, weights, totals, out = saved
    dout = jax.lax.optimization_barrier(dout)
    inner = (dout.astype(jnp.float32) * out).reshape(*out.shape[:2], heads, -1).sum(-1)  # [B, T, H]
    inner = inner.swapaxes(1, 2).reshape(totals.shape)
    dout = _split_heads(dout[:, :, None], heads)[0]
    scaled = (dout / totals).astype(dout.dtype)
    dweights = jnp.einsum("nqd,nkd->nqk", scaled, v, preferred_element_type=jnp.float32)
    dscores = (weights * (dweights - inner / totals)).astype(q.dtype)
    dq = jnp.einsum("nqk,nkd->nqd", dscores, k) * q.shape[-1] ** -0.5
    dk = jnp.einsum("nqk,nqd->nkd", dscores, q)
    dv = jnp.einsum("nqk,nqd->nkd", weights, scaled)
    images = out.shape[0]
    together = jnp.stack([dq, dk, dv]).reshape(3, images, heads, *dq.shape[1:])
    return (together.transpose(1, 3, 0, 2, 4).reshape(images, out.shape[1], 3, -1),)


attention.defvjp(_forward, _backward)


def _split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Returns [n, B·H, T, d] for [B, T, n, H·d]."""
    images, tokens, parts, width = x.shape
    x = x.reshape(images, tokens, parts, heads, width // heads).transpose(2, 0, 3, 1, 4)
    return x.reshape(parts, images * heads, tokens, width // heads)


def _join_heads(x: jax.Array, heads: int) -> jax.Array:
    """Returns [B, T, H·d] for [B·H, T, d]."""
    merged, tokens, depth = x.shape
    return x.reshape(merged // heads, heads, tokens, depth).swapaxes(1, 2).reshape(-1, tokens, heads * depth)
