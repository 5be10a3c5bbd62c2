"""Normalization of vectors: to unit length, and layer norm."""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from mae_jax.ops import partitioning

EPS = 1e-6  # added to the variance in layer norm, as in MAE and timm
WIDEST = 4096  # most features that the GPU kernel supports


def unit(x: jax.Array) -> jax.Array:
    """Returns vectors [..., D] scaled to length 1; zero vectors stay zero, with finite gradients."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the layer norm (arXiv 1607.06450) of x [..., D] with scale and bias [D], in `dtype`.

    It is computed in float32 for any dtype of x. On GPUs the gradient is one kernel, which reads x in its own dtype.
    """
    return (_layer_norm_gpu if has_kernel(x.shape[-1]) else _layer_norm)(x, scale, bias, dtype)


def residual_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: jnp.dtype,
                  added: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns x [B, T, D] unchanged, for the residual connection, and its `layer_norm`, the input of the branch.

    On GPUs, one kernel computes the gradient of x from the gradients of both results.

    Args:
      x: [B, T, D].
      scale, bias: [D].
      dtype: of the layer norm.
      added: a bias [D] that was added to all tokens of x; only for devices with the kernel (`has_kernel`). It is not
        added here, but the kernel computes its gradient; the caller must stop the gradient where it adds the bias.

    Raises:
      ValueError: `added` is given, and the devices have no kernel.
    """
    if not has_kernel(x.shape[-1]):
        if added is not None:
            raise ValueError("these devices have no kernel to take the gradient of `added`")
        return x, _layer_norm(x, scale, bias, dtype)
    return _residual_norm_gpu(x, scale, bias, jnp.zeros_like(bias) if added is None else added, dtype)


def has_kernel(width: int) -> bool:
    """Returns whether the devices of the surrounding mesh have the gradient kernel for `width` features."""
    device = partitioning.device()
    return (bool(device) and device.platform == "gpu" and not partitioning.OLDER.match(device.device_kind)
            and width <= WIDEST and _has_triton())


@functools.cache
def _has_triton() -> bool:
    """Returns whether this JAX has Pallas for Triton; JAX 0.12 announces its removal."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: jnp.dtype) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + EPS)
    return ((x - mean) * (rate * scale) + bias).astype(dtype)


def _residual_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, added: jax.Array,
                   dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    return x, _layer_norm(x, scale, bias, dtype)


def _gradients(saved: tuple[jax.Array, ...], *gradients: jax.Array) -> tuple[jax.Array, ...]:
    from mae_jax.ops import normalization_gpu  # imports Pallas for Triton, which may be missing

    return normalization_gpu.backward(*saved, *gradients, eps=EPS)


_layer_norm_gpu = jax.custom_vjp(_layer_norm, nondiff_argnums=(3,))
_layer_norm_gpu.defvjp(lambda x, scale, bias, dtype: (_layer_norm(x, scale, bias, dtype), (x, scale)),
                       lambda dtype, saved, dy: _gradients(saved, dy))
_residual_norm_gpu = jax.custom_vjp(_residual_norm, nondiff_argnums=(4,))
_residual_norm_gpu.defvjp(lambda x, *rest: (_residual_norm(x, *rest), (x, rest[0])),
                          lambda dtype, saved, gradients: _gradients(saved, *gradients[::-1]))
