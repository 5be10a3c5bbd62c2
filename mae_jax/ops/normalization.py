"""Normalization of vectors."""

import jax
import jax.numpy as jnp

from mae_jax.ops import partitioning

EPS = 1e-6  # of layer norm, as in MAE and timm


def unit(x: jax.Array) -> jax.Array:
    """Returns vectors [..., D] scaled to length 1; those of no length stay, and have finite gradients."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns x [..., D], its vectors normalized (arXiv 1607.06450), times scale plus bias [D], in `dtype`.

    It is computed in float32 whatever x is. On GPUs the gradient is written out: it keeps x alone, in its own dtype,
    and passes over x and the gradient twice, first for four sums over each vector, then for all that is as large as x
    and for the sums over all vectors. Autodiff's passes over them more often, and writes float32 between.
    """
    return (_by_passes if partitioning.platform() == "gpu" else _layer_norm)(x, scale, bias, dtype)


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: jnp.dtype) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + EPS)
    return ((x - mean) * (rate * scale) + bias).astype(dtype)


_by_passes = jax.custom_vjp(_layer_norm, nondiff_argnums=(3,))


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array,
             dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _layer_norm(x, scale, bias, dtype), (x, scale)


def _backward(dtype: jnp.dtype, saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
    x, scale = saved
    # Behind the barrier, the sum over x is not taken for that of the forward pass, which is one kernel with its sums.
    wide, dy = (part.astype(jnp.float32) for part in jax.lax.optimization_barrier((x, dy)))
    inner = dy * scale
    sums = [part.sum(-1, keepdims=True) for part in (wide, wide * wide, inner, inner * wide)]
    # Without the barrier, XLA makes one kernel of both passes, and others, which pass again, for the sums over vectors.
    mean, square, shift, product = (part / x.shape[-1] for part in jax.lax.optimization_barrier(sums))
    rate = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + EPS)
    normal = (wide - mean) * rate
    dx = (inner - shift - normal * ((product - mean * shift) * rate)) * rate
    vectors = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (dy * normal).sum(vectors), dy.sum(vectors)


_by_passes.defvjp(_forward, _backward)
