"""Batch norm without scale and shift, over the global batch (MAE A.1; torch's BatchNorm1d and BatchNorm2d)."""

import math

import jax
import jax.numpy as jnp

EPS = 1e-6  # MAE's published linear probe
MOMENTUM = 0.1  # weight of the newest batch in the running moments; torch's default
Moments = dict[str, jax.Array]


def start(width: int) -> Moments:
    """Returns the initial running moments: mean 0 and variance 1, float32 [D] each."""
    return {"mean": jnp.zeros(width), "var": jnp.ones(width)}


def apply(features: jax.Array, moments: Moments, eps: float = EPS) -> jax.Array:
    """Normalizes features [B, ..., D] with the given moments [D]."""
    return (features - moments["mean"]) * jax.lax.rsqrt(moments["var"] + eps)


def train(features: jax.Array, weight: jax.Array, running: Moments, eps: float = EPS) -> tuple[jax.Array, Moments]:
    """Normalizes features [B, ..., D] with the moments of the batch, over all axes but the last.

    The moments are those of the global batch on any number of devices; MAE's released code normalizes over each GPU's
    part of the batch.

    Args:
      features: [B, ..., D].
      weight: float32 [B] of 0 and 1; 0 excludes a row, such as padding.
      running: running moments [D], whose variance is unbiased.
      eps: added to the variance.

    Returns:
      The normalized features and the updated running moments, which a batch without rows leaves as they are.
    """
    axes, each = tuple(range(features.ndim - 1)), math.prod(features.shape[1:-1])
    weights = weight.reshape(-1, *[1] * (features.ndim - 1))
    count = jnp.maximum(weight.sum() * each, 2)
    mean = (features * weights).sum(axes) / count
    var = (jnp.square(features - mean) * weights).sum(axes) / count
    batch = {"mean": mean, "var": var * count / (count - 1)}
    moments = jax.tree.map(lambda old, new: jnp.where(weight.any(), (1 - MOMENTUM) * old + MOMENTUM * new, old),
                           running, batch)
    return apply(features, {"mean": mean, "var": var}, eps), jax.lax.stop_gradient(moments)
