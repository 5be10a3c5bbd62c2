"""Classification heads over pooled features."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.models.layers import layer_norm
from mae_jax.ops.dense import linear


class Classifier(nn.Module):
    """Float32 logits [B, C] of features [B, D]: a layer norm where the encoder has none at its end, then linear.

    `norm` belongs to average pooling, whose mean is normalised and not its terms (MAE's fine-tuning, timm's fc_norm).
    """

    classes: int
    norm: bool
    std: float  # of the first kernel

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        if self.norm:
            x = layer_norm(jnp.float32, "fc_norm")(x)
        return Head(self.classes, self.std, name="head")(x)


class Head(nn.Module):
    """A linear layer in float32 that starts near zero."""

    classes: int
    std: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], self.classes))
        return linear(x, kernel, self.param("bias", nn.initializers.zeros, (self.classes,)))
