"""Heads over pooled features: classifiers, and the projection of joint embeddings."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.models.layers import GELUS, TOKEN_STD, Dense, layer_norm
from mae_jax.ops.linear import linear

MIN_NORM = 1e-6  # what lengths are divided by, at the least


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


class Projection(nn.Module):
    """DINO's head (arXiv 2104.14294, Appendix C): a perceptron, then cosines with learned directions; [B, D] → [B, K].

    As published: three layers whose last is a narrow one, no batch norm for ViTs, and directions of length 1
    (`norm_last_layer`).
    """

    hidden: int
    bottleneck: int
    outputs: int
    gelu: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for number, width in enumerate((self.hidden, self.hidden, self.bottleneck), 1):
            x = Dense(width, self.dtype, init="normal", name=f"fc{number}")(x)
            x = x if number == 3 else GELUS[self.gelu](x)
        return Directions(self.outputs, self.dtype, name="last")(x).astype(jnp.float32)


class Perceptron(nn.Module):
    """Two linear layers with a GELU between them, [..., D] → [..., K]; the hidden one is `hidden` wide."""

    hidden: int
    outputs: int
    gelu: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = GELUS[self.gelu](Dense(self.hidden, self.dtype, name="fc1")(x))
        return Dense(self.outputs, self.dtype, name="fc2")(hidden)


class Directions(nn.Module):
    """Cosines of [B, D] with learned directions, [B, K]; the lengths of a kernel's columns do not count."""

    outputs: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(TOKEN_STD), (x.shape[-1], self.outputs))
        unit = kernel / jnp.maximum(jnp.linalg.norm(kernel, axis=0, keepdims=True), MIN_NORM)
        x = x.astype(jnp.float32)
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), MIN_NORM)
        return linear(x.astype(self.dtype), unit, jnp.zeros(self.outputs, kernel.dtype))
