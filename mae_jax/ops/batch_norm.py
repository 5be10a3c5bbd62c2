"""Batch norm without scale and shift, over the global batch (MAE A.1; torch's BatchNorm1d and BatchNorm2d)."""

import math

import jax
import jax.numpy as jnp

EPS = 1e-6  # MAE's published linear probe
MOMENTUM = 0.1  # of the newest batch in the running moments; torch's default
Moments = dict[str, jax.Array]


def start(width: int) -> Moments:
    """Returns the running mean and variance [D] before the first batch."""
    return {"mean": jnp.zeros(width), "var": jnp.ones(width)}


def apply(features: jax.Array, moments: Moments, eps: float = EPS) -> jax.Array:
    """Normalises features [B, ..., D] by the given moments."""
    return (features - moments["mean"]) * jax.lax.rsqrt(moments["var"] + eps)


def train(features: jax.Array, weight: jax.Array, running: Moments, eps: float = EPS) -> tuple[jax.Array, Moments]:
    """Normalises features [B, ..., D] by their own moments; returns them and new running moments (unbiased variance).

    `weight`, float32 [B], is 0 for rows that do not count. The batch is the global one whatever the devices are; the
    published code normalises over each GPU's share. Moments are over all axes but the last.
    """
    axes, each = tuple(range(features.ndim - 1)), math.prod(features.shape[1:-1])
    weights = weight.reshape(-1, *[1] * (features.ndim - 1))
    count = jnp.maximum(weight.sum() * each, 2)
    mean = (features * weights).sum(axes) / count
    var = (jnp.square(features - mean) * weights).sum(axes) / count
    batch = {"mean": mean, "var": var * count / (count - 1)}
    moments = jax.tree.map(lambda old, new: (1 - MOMENTUM) * old + MOMENTUM * new, running, batch)
    return apply(features, {"mean": mean, "var": var}, eps), jax.lax.stop_gradient(moments)
