"""Norms of maps [B, H, W, C]: over the channels of a cell, over groups of channels of an image, over the batch."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.models.layers import layer_norm
from mae_jax.ops import batch_norm

MOMENTS = "moments"  # the collection of running means and variances
GROUPS = 32  # of group norm (arXiv 1803.08494), at the most
EPS = 1e-5  # of group norm and batch norm, as torch's
Norm = Callable[[jax.Array, jax.Array | None], jax.Array]


class GroupNorm(nn.Module):
    """Group norm (arXiv 1803.08494) of maps [B, H, W, C]: statistics of each image alone, float32."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        groups = int(np.gcd(width, GROUPS))
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        wide = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, width // groups)
        mean = wide.mean((1, 2, 4), keepdims=True)
        rate = jax.lax.rsqrt(jnp.square(wide - mean).mean((1, 2, 4), keepdims=True) + EPS)
        return (((wide - mean) * rate).reshape(x.shape) * scale + bias).astype(self.dtype)


class BatchNorm(nn.Module):
    """Normalizes maps [B, h, w, C] and scales and shifts their channels, in `dtype`; float32 inside.

    Over all cells of all images of the global batch in training, whose means and variances the collection MOMENTS
    follows, and by these otherwise.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, weight: jax.Array | None) -> jax.Array:
        """Args: weight: float32 [B], 0 for images that do not count, in training; None: otherwise."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running = {name: self.variable(MOMENTS, name, lambda value=value: value)
                   for name, value in batch_norm.start(channels).items()}
        before = {name: variable.value for name, variable in running.items()}
        if weight is None or self.is_initializing():
            normal = batch_norm.apply(x.astype(jnp.float32), before, EPS)
            return (normal * scale + bias).astype(self.dtype)

        @jax.checkpoint  # of the maps, what is kept is in their own dtype
        def of_batch(x: jax.Array, weight: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, Any]:
            normal, moments = batch_norm.train(x.astype(jnp.float32), weight, before, EPS)
            return (normal * scale + bias).astype(self.dtype), moments

        out, moments = of_batch(x, weight, scale, bias)
        for name, variable in running.items():  # which a batch of nothing that counts leaves alone
            variable.value = jnp.where(weight.any(), moments[name], before[name])
        return out


def map_norm(kind: str, dtype: Any, name: str) -> Norm:
    """Returns the norm of maps, a function of them and of `BatchNorm`'s weight.

    Args:
      kind: 'layer', over the channels of each cell, 'group', 'batch' or 'none'.
    """
    if kind == "batch":
        return BatchNorm(dtype, name=name)
    norms = {"layer": layer_norm, "group": lambda dtype, name: GroupNorm(dtype, name=name),
             "none": lambda *_: lambda x: x}
    norm = norms[kind](dtype, name)
    return lambda x, _: norm(x)
