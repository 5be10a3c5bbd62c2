"""Layer norm, group norm and batch norm of feature maps [B, H, W, C]."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.models.layers import layer_norm
from mae_jax.ops import batch_norm

MOMENTS = "moments"  # the variable collection of running means and variances
GROUPS = 32  # largest number of groups of group norm (arXiv 1803.08494)
EPS = 1e-5  # of group norm and batch norm, as torch's
Norm = Callable[[jax.Array, jax.Array | None], jax.Array]


class GroupNorm(nn.Module):
    """Group norm (arXiv 1803.08494) of maps [B, H, W, C], computed in float32."""

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
    """Batch norm of maps [B, h, w, C], computed in float32, with output in `dtype`.

    Training uses the statistics of the global batch and updates the running ones in the collection MOMENTS. Evaluation
    uses the running statistics.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, weight: jax.Array | None) -> jax.Array:
        """Args: weight: in training, float32 [B], 0 for images to ignore; None in evaluation."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running = {name: self.variable(MOMENTS, name, lambda value=value: value)
                   for name, value in batch_norm.start(channels).items()}
        before = {name: variable.value for name, variable in running.items()}
        if weight is None or self.is_initializing():
            normal = batch_norm.apply(x.astype(jnp.float32), before, EPS)
            return (normal * scale + bias).astype(self.dtype)

        @jax.checkpoint  # keeps the maps for the backward pass in their own dtype, not in float32
        def of_batch(x: jax.Array, weight: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, Any]:
            normal, moments = batch_norm.train(x.astype(jnp.float32), weight, before, EPS)
            return (normal * scale + bias).astype(self.dtype), moments

        out, moments = of_batch(x, weight, scale, bias)
        for name, variable in running.items():
            variable.value = moments[name]
        return out


def map_norm(kind: str, dtype: Any, name: str) -> Norm:
    """Returns a norm as a function of maps [B, H, W, C] and of `BatchNorm`'s weight, which other norms ignore.

    Args:
      kind: 'layer' (over the channels of each cell), 'group', 'batch' or 'none'.
      dtype: dtype of the output; 'none' keeps that of the maps.
      name: name of the Flax module.
    """
    if kind == "batch":
        return BatchNorm(dtype, name=name)
    norms = {"layer": layer_norm, "group": lambda dtype, name: GroupNorm(dtype, name=name),
             "none": lambda *_: lambda x: x}
    norm = norms[kind](dtype, name)
    return lambda x, _: norm(x)
