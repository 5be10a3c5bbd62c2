"""The layers of a plain Vision Transformer (pre-norm; MAE A.1, timm's ViT)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops import normalization
from mae_jax.ops.linear import gelu, linear, linears
from mae_jax.ops.partitioning import platform

TOKEN_STD = 0.02  # initial deviation of class and mask tokens, as published
INITS = {  # of kernels: MAE A.1; DeiT
    "xavier": nn.initializers.xavier_uniform(),
    "normal": nn.initializers.normal(TOKEN_STD),
}
GELUS = {"erf": gelu, "tanh": lambda x: nn.gelu(x, approximate=True)}


def sincos_positions(grid: tuple[int, int], width: int) -> np.ndarray:
    """Returns the fixed 2-D sine-cosine position embedding, float32 [N, width], in raster order.

    The first half of the channels encodes the column, the second the row; within each half sines come first, with
    frequencies 10000^(-k / (width / 4)) (MAE's released models; Transformer, section 3.5).
    """
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))

    def encode(positions: np.ndarray) -> np.ndarray:
        angles = positions.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.mgrid[: grid[0], : grid[1]].astype(np.float64)
    return np.concatenate([encode(columns), encode(rows)], axis=1).astype(np.float32)


def embed_positions(grid: tuple[int, int], width: int, order: jax.Array, dtype: Any) -> jax.Array:
    """Returns the fixed position embeddings [B, T, width] of patches with raster indices `order`, int32 [B, T].

    On TPUs as a product with one-hot rows, which gives the same numbers: their gathers go row by row.
    """
    table = jnp.asarray(sincos_positions(grid, width), dtype)

    def one_hot(order: jax.Array) -> jax.Array:
        return jax.nn.one_hot(order, len(table), dtype=dtype) @ table

    return jax.lax.platform_dependent(order, tpu=one_hot, default=lambda order: table[order])


def drop_path(key: jax.Array, rates: np.ndarray, images: int) -> jax.Array:
    """Draws stochastic depth (arXiv 1603.09382): float32 [depth, 2, B], what each image's branches are multiplied by.

    A branch is dropped with the rate of its block, and what stays is scaled up, so that its mean stays (timm).

    Args:
      rates: [depth], each below 1.
    """
    keep = 1 - jnp.asarray(rates, jnp.float32)[:, None, None]
    return jax.random.bernoulli(key, keep, (len(rates), 2, images)) / keep


class Dense(nn.Module):
    """A linear layer over the last axis with zero bias.

    `split` is the dimension of the kernel that devices along `tensor` share: 'in', 'out' or none.
    """

    features: int
    dtype: Any
    split: str = ""
    init: str = "xavier"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", INITS[self.init], (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return linear(x.astype(self.dtype), kernel, bias, self.split)


class DenseQKV(nn.Module):
    """Queries, keys and values, three [B, T, D] for tokens [B, T, D], from one kernel [D, 3 D] as in timm and MAE.

    Three products, not one whose result would have to be cut: its parts would be copied, and their gradients again. On
    GPUs their gradients are put together, which is fewer kernels and bytes than three products of each kind.
    """

    dtype: Any
    init: str = "xavier"

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        width = x.shape[-1]
        kernel = self.param("kernel", INITS[self.init], (width, 3 * width)).reshape(width, 3, width)
        bias = self.param("bias", nn.initializers.zeros, (3 * width,)).reshape(3, width)
        x = x.astype(self.dtype)
        if platform() == "gpu":
            return list(linears(x, kernel, bias, "out"))
        return [linear(x, kernel[:, i], bias[i], "out") for i in range(3)]


class LayerNorm(nn.Module):
    """Layer norm of tokens [..., D], whose statistics are float32 whatever the activations are."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return normalization.layer_norm(x, *_scale_and_bias(self, x.shape[-1]), self.dtype)


class ResidualNorm(nn.Module):
    """Tokens [B, T, D] as they are, and their layer norm: what a branch is added to, and what goes into it.

    The two are one operation for the sake of its gradient; `normalization.residual_norm` also says what `added` is.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, added: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        return normalization.residual_norm(x, *_scale_and_bias(self, x.shape[-1]), self.dtype, added)


def _scale_and_bias(norm: nn.Module, width: int) -> tuple[jax.Array, jax.Array]:
    return norm.param("scale", nn.initializers.ones, (width,)), norm.param("bias", nn.initializers.zeros, (width,))


def layer_norm(dtype: Any, name: str) -> LayerNorm:
    """Layer norm whose statistics are float32 whatever the activations are."""
    return LayerNorm(dtype, name=name)


class LayerScale(nn.Module):
    """Multiplies the channels of a branch by learned factors (CaiT, arXiv 2103.17239, equation 4)."""

    first: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.param("gamma", nn.initializers.constant(self.first), (x.shape[-1],)).astype(x.dtype)
