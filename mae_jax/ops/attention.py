"""Softmax attention whose backward pass keeps little and multiplies in the dtype of the activations."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns softmax(q kᵀ / √d) v, [B, T, H, d], for queries, keys and values [B, T, H, d] of H heads.

    The softmax is float32. Its division comes after the product with the values, so that it is over [B, T, H, d] and
    not over [B, H, T, T]. The gradient is written out because autodiff would keep float32 weights, and multiply
    float32 gradients of the scores with bfloat16 keys and queries.
    """
    return _forward(q, k, v)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    totals = weights.sum(-1).swapaxes(1, 2)[..., None]
    weights = weights.astype(q.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32) / totals
    out = out.astype(q.dtype)
    return out, (q, k, v, weights, totals, out)


def _backward(saved: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, weights, totals, out = saved
    scaled = dout / totals  # float32
    inner = (scaled * out).sum(-1).swapaxes(1, 2)[..., None]
    scaled = scaled.astype(q.dtype)
    dweights = jnp.einsum("bqhd,bkhd->bhqk", scaled, v, preferred_element_type=jnp.float32)
    dscores = (weights * (dweights - inner)).astype(q.dtype)
    dq = jnp.einsum("bhqk,bkhd->bqhd", dscores, k) * q.shape[-1] ** -0.5
    dk = jnp.einsum("bhqk,bqhd->bkhd", dscores, q)
    return dq, dk, jnp.einsum("bhqk,bqhd->bkhd", weights, scaled)


attention.defvjp(_forward, _backward)
