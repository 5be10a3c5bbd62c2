"""Batch norm without scale and shift, of features, over the global batch (MAE A.1; torch's BatchNorm1d)."""

import jax
import jax.numpy as jnp

EPS = 1e-6  # MAE's published linear probe
MOMENTUM = 0.1  # of the newest batch in the running moments; torch's default
Moments = dict[str, jax.Array]


def start(width: int) -> Moments:
    """Returns the running mean and variance [D] before the first batch."""
    return {"mean": jnp.zeros(width), "var": jnp.ones(width)}


def apply(features: jax.Array, moments: Moments) -> jax.Array:
    """Normalises features [B, D] by the given moments."""
    return (features - moments["mean"]) * jax.lax.rsqrt(moments["var"] + EPS)


def train(features: jax.Array, weight: jax.Array, running: Moments) -> tuple[jax.Array, Moments]:
    """Normalises features [B, D] by their own moments; returns them and new running moments (unbiased variance).

    `weight`, float32 [B], is 0 for rows that do not count. The batch is the global one whatever the devices are; the
    published code normalises over each GPU's share.
    """
    count = jnp.maximum(weight.sum(), 2)
    mean = (features * weight[:, None]).sum(0) / count
    var = (jnp.square(features - mean) * weight[:, None]).sum(0) / count
    batch = {"mean": mean, "var": var * count / (count - 1)}
    moments = jax.tree.map(lambda old, new: (1 - MOMENTUM) * old + MOMENTUM * new, running, batch)
    return apply(features, {"mean": mean, "var": var}), jax.lax.stop_gradient(moments)
