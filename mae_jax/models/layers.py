"""The layers of a plain Vision Transformer (pre-norm; MAE A.1, timm's ViT)."""

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops.attention import Kept, attention
from mae_jax.ops.dense import gelu, linear
from mae_jax.ops.layout import ROWS, constrain

EPS = 1e-6  # layer norm, as in MAE and timm
TOKEN_STD = 0.02  # initial deviation of class and mask tokens, as published
INITS = {  # of kernels: MAE A.1; DeiT
    "xavier": nn.initializers.xavier_uniform(),
    "normal": nn.initializers.normal(TOKEN_STD),
}
GELUS = {"erf": gelu, "tanh": lambda x: nn.gelu(x, approximate=True)}
REMATS: dict[str, Callable[..., Any] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


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

    Three products, not one whose result would have to be cut: its parts would be copied, and their gradients again.
    """

    dtype: Any
    init: str = "xavier"

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        width = x.shape[-1]
        kernel = self.param("kernel", INITS[self.init], (width, 3 * width)).reshape(width, 3, width)
        bias = self.param("bias", nn.initializers.zeros, (3 * width,)).reshape(3, width)
        return [linear(x.astype(self.dtype), kernel[:, i], bias[i], "out") for i in range(3)]


def layer_norm(dtype: Any, name: str) -> nn.LayerNorm:
    """Layer norm whose statistics are float32 whatever the activations are."""
    return nn.LayerNorm(epsilon=EPS, dtype=dtype, use_fast_variance=False, name=name)


class LayerScale(nn.Module):
    """Multiplies the channels of a branch by learned factors (CaiT, arXiv 2103.17239, equation 4)."""

    first: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.param("gamma", nn.initializers.constant(self.first), (x.shape[-1],)).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, T, D]; the softmax is float32."""

    heads: int
    dtype: Any
    init: str = "xavier"
    kept: Kept | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = attention(*DenseQKV(self.dtype, self.init, name="qkv")(x), self.heads, self.kept)
        return Dense(x.shape[-1], self.dtype, "in", self.init, name="proj")(out)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, over tokens [B, T, D]."""

    ratio: int
    gelu: str
    dtype: Any
    init: str = "xavier"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = GELUS[self.gelu](Dense(self.ratio * x.shape[-1], self.dtype, "out", self.init, name="fc1")(x))
        return Dense(x.shape[-1], self.dtype, "in", self.init, name="fc2")(hidden)


class Block(nn.Module):
    """One pre-norm Transformer block over tokens [B, T, D]; its branches are scaled, and dropped, where that is asked.

    `keep`, float32 [2, B], is a block's part of `drop_path`.
    """

    heads: int
    mlp_ratio: int
    gelu: str
    dtype: Any
    layer_scale: float = 0.0
    init: str = "xavier"
    kept: Kept | None = None  # keys of the attention

    @nn.compact
    def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        def branch(out: jax.Array, number: int) -> jax.Array:
            if self.layer_scale:
                out = LayerScale(self.layer_scale, name=f"ls{number + 1}")(out)
            return out if keep is None else out * keep[number, :, None, None].astype(out.dtype)

        x = constrain(x, ROWS)
        attend = Attention(self.heads, self.dtype, self.init, self.kept, name="attn")
        mlp = Mlp(self.mlp_ratio, self.gelu, self.dtype, self.init, name="mlp")
        x = x + branch(attend(layer_norm(self.dtype, "norm1")(x)), 0)
        return x + branch(mlp(layer_norm(self.dtype, "norm2")(x)), 1)


class Blocks(nn.Module):
    """Base of encoder and decoder: a stack of blocks whose parameters are per-block leaves `block_00`, `block_01`, ...

    `scan` compiles one block and stacks the leaves here, inside the forward pass, so that checkpoints, path rules and
    the optimiser never see a stack. `remat` recomputes activations in the backward pass.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: int
    gelu: str
    dtype: Any
    scan: bool
    remat: str
    layer_scale: float = 0.0
    init_kind: str = "xavier"
    kept: tuple[Kept | None, ...] = ()  # of each block's attention; () as (None,) · depth

    def block(self, index: int, **options: Any) -> Block:
        """Returns the module of one block."""
        kept = self.kept[index] if self.kept else None
        return Block(self.heads, self.mlp_ratio, self.gelu, self.dtype, self.layer_scale, self.init_kind, kept,
                     **options)

    def run_blocks(self, x: jax.Array, depth: int | None = None, keep: jax.Array | None = None) -> jax.Array:
        """Applies the first `depth` blocks (all when None) to tokens [B, T, D].

        Args:
          keep: float32 [depth, 2, B] of `drop_path`; None: nothing is dropped.
        """
        blocks = [self.block(index, name=f"block_{index:02d}") for index in range(self.depth)]
        if self.is_initializing():
            for module in blocks:
                x = module(x)
            return x
        params = [self.variables["params"][module.name] for module in blocks][:depth]
        start = 0
        for _, alike in itertools.groupby(blocks[:depth], lambda module: module.kept):
            stop = start + len(list(alike))
            x = self._alike(x, self.block(start, parent=None), params[start:stop],
                            None if keep is None else keep[start:stop])
            start = stop
        return x

    def _alike(self, x: jax.Array, block: Block, params: list[Any], keep: jax.Array | None) -> jax.Array:
        """Applies blocks that differ in nothing but their parameters, and their part of `keep`."""
        def apply(x: jax.Array, p: Any, keep: jax.Array | None) -> jax.Array:
            return block.apply({"params": p}, x, keep)

        if self.remat != "none":
            apply = jax.checkpoint(apply, policy=REMATS[self.remat], prevent_cse=not self.scan)
        if self.scan:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
            return jax.lax.scan(lambda x, item: (apply(x, *item), None), x, (stacked, keep))[0]
        for index, p in enumerate(params):
            x = apply(x, p, None if keep is None else keep[index])
        return x
