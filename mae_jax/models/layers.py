"""The layers of a plain Vision Transformer (pre-norm; MAE A.1, timm's ViT)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops import normalization
from mae_jax.ops.linear import gelu, linear, linears
from mae_jax.ops.partitioning import platform

TOKEN_STD = 0.02  # initial standard deviation of class and mask tokens (MAE's released code)
INITS = {  # initializers of kernels: MAE A.1; DeiT
    "xavier": nn.initializers.xavier_uniform(),
    "normal": nn.initializers.normal(TOKEN_STD),
}
GELUS = {"erf": gelu, "tanh": lambda x: nn.gelu(x, approximate=True)}


def sincos_positions(grid: tuple[int, int], width: int) -> np.ndarray:
    """Returns the fixed 2-D sine-cosine position embedding, float32 [N, width], in raster order.

    The first half of the channels encodes the column and the second half the row. Each half holds width / 4 sines, then
    as many cosines, with frequencies 10000^(-k / (width / 4)) (MAE's released models; Transformer, section 3.5).
    """
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))

    def encode(positions: np.ndarray) -> np.ndarray:
        angles = positions.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.mgrid[: grid[0], : grid[1]].astype(np.float64)
    return np.concatenate([encode(columns), encode(rows)], axis=1).astype(np.float32)


def embed_positions(grid: tuple[int, int], width: int, order: jax.Array, dtype: Any) -> jax.Array:
    """Returns the fixed position embeddings [B, T, width] of patches with raster indices `order`, int32 [B, T].

    On TPUs, where a gather goes row by row, the look-up is a product with one-hot rows. The numbers are the same.
    """
    table = jnp.asarray(sincos_positions(grid, width), dtype)

    def one_hot(order: jax.Array) -> jax.Array:
        return jax.nn.one_hot(order, len(table), dtype=dtype) @ table

    return jax.lax.platform_dependent(order, tpu=one_hot, default=lambda order: table[order])


def drop_path(key: jax.Array, rates: np.ndarray, images: int) -> jax.Array:
    """Draws the factors of stochastic depth (arXiv 1603.09382), one per block, branch and image.

    A branch is dropped with its block's rate. A branch that stays is divided by 1 - rate, which keeps the mean (timm).

    Args:
      key: of the draw.
      rates: drop rates [depth], each below 1.
      images: B.

    Returns:
      float32 [depth, 2, B], 0 or 1 / (1 - rate).
    """
    keep = 1 - jnp.asarray(rates, jnp.float32)[:, None, None]
    return jax.random.bernoulli(key, keep, (len(rates), 2, images)) / keep


class Dense(nn.Module):
    """A linear layer [..., D] → [..., features] in `dtype`; the bias is zero at first.

    `split` is the dimension of the kernel that is sharded along the mesh axis `tensor`: 'in', 'out' or '' for none.
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
    """Maps tokens [B, T, D] to queries, keys and values [B, T, D] each, with one kernel [D, 3 D] as in timm and MAE.

    The forward pass is three products: the slices of a single result, and of its gradient, would be copied. On GPUs the
    backward pass joins the three gradients (`ops.linear.linears`), which takes fewer kernels and moves fewer bytes.
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
    """Layer norm of tokens [..., D] with float32 statistics and results in `dtype`."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return normalization.layer_norm(x, *_scale_and_bias(self, x.shape[-1]), self.dtype)


class ResidualNorm(nn.Module):
    """Returns tokens [B, T, D] unchanged, for the residual connection, and their layer norm, the input of the branch.

    The two results belong to one operation so that one kernel computes its gradient. See
    `ops.normalization.residual_norm`, also for `added`.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, added: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        return normalization.residual_norm(x, *_scale_and_bias(self, x.shape[-1]), self.dtype, added)


def _scale_and_bias(norm: nn.Module, width: int) -> tuple[jax.Array, jax.Array]:
    return norm.param("scale", nn.initializers.ones, (width,)), norm.param("bias", nn.initializers.zeros, (width,))


def layer_norm(dtype: Any, name: str) -> LayerNorm:
    """Builds a `LayerNorm` with results in `dtype`."""
    return LayerNorm(dtype, name=name)


class LayerScale(nn.Module):
    """Multiplies the channels of x [..., D] by learned factors [D] (CaiT, arXiv 2103.17239, equation 4)."""

    first: float  # initial value of the factors

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.param("gamma", nn.initializers.constant(self.first), (x.shape[-1],)).astype(x.dtype)
