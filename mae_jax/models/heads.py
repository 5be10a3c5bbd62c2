"""Heads over pooled features: classifiers, and the projection heads of self-supervised methods."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.models.layers import GELUS, TOKEN_STD, Dense, layer_norm
from mae_jax.ops.linear import linear

MIN_NORM = 1e-6  # lower bound of a norm that divides


class Classifier(nn.Module):
    """Maps features [B, D] to float32 logits [B, C] by an optional layer norm and a linear layer.

    `norm` is for average pooling: the mean of the tokens is normalized instead of each token (MAE's fine-tuning; timm's
    `fc_norm`).
    """

    classes: int
    norm: bool
    std: float  # initial standard deviation of the kernel

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        if self.norm:
            x = layer_norm(jnp.float32, "fc_norm")(x)
        return Head(self.classes, self.std, name="head")(x)


class Head(nn.Module):
    """A linear layer from features float32 [..., D] to logits [..., C]; the bias is zero at first."""

    classes: int
    std: float  # initial standard deviation of the kernel

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], self.classes))
        return linear(x, kernel, self.param("bias", nn.initializers.zeros, (self.classes,)))


class Projection(nn.Module):
    """DINO's projection head (arXiv 2104.14294, Appendix C), features [B, D] → float32 [B, K].

    A three-layer MLP with a narrow last layer and no batch norm, then a linear layer with l2-normalized inputs and
    weights (`norm_last_layer`), as published.
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
    """Two linear layers with a GELU between them, [..., D] → [..., outputs]."""

    hidden: int
    outputs: int
    gelu: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = GELUS[self.gelu](Dense(self.hidden, self.dtype, name="fc1")(x))
        return Dense(self.outputs, self.dtype, name="fc2")(hidden)


class Directions(nn.Module):
    """A linear layer with l2-normalized inputs and weights: cosines [B, K] of inputs [B, D] with K learned directions.
    """

    outputs: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(TOKEN_STD), (x.shape[-1], self.outputs))
        unit = kernel / jnp.maximum(jnp.linalg.norm(kernel, axis=0, keepdims=True), MIN_NORM)
        x = x.astype(jnp.float32)
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), MIN_NORM)
        return linear(x.astype(self.dtype), unit, jnp.zeros(self.outputs, kernel.dtype))
