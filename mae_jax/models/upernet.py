"""UperNet (arXiv 1807.10221) on a plain ViT: maps of four blocks, pyramid pooling, an FPN and per-pixel classifiers."""

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mae_jax.errors import UserError
from mae_jax.models.heads import Head
from mae_jax.models.layers import LayerNorm
from mae_jax.models.map_norms import BatchNorm
from mae_jax.models.pyramid import Deconv
from mae_jax.ops import convolution, resampling
from mae_jax.ops.flops import conv_flops
from mae_jax.ops.linear import gelu, linear

MAPS = 4  # input maps, from four blocks
POOLED = (1, 2, 3, 6)  # output sizes of the pyramid pooling (PSPNet, arXiv 1612.01105)
HEAD_STD = 0.01  # initial deviation of the classifiers' kernels, as in mmsegmentation
FACTORS = (4.0, 2.0, 1.0, 0.5)  # scale of each map: strides of 4, 8, 16 and 32 pixels for patches of 16
OF_PATCH_8 = (2.0, 1.0, 0.5, 0.25)  # the same strides for patches of 8
HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # of convolutions, as in mmsegmentation


def map_blocks(config: ConfigDict) -> tuple[int, ...]:
    """Returns the indices of the four blocks in method.blocks, from 0; raises UserError.

    'auto': the blocks at one third, half, two thirds and the end of the depth, as published for 12 and 24 blocks.
    """
    text, depth = config.method.blocks, config.model.depth
    if text == "auto":
        return tuple(max(depth * share // 6 - 1, 0) for share in (2, 3, 4, 6))
    parts = [part.strip() for part in text.split(",")]
    blocks = tuple(int(part) for part in parts if re.fullmatch(r"\d{1,4}", part))
    if len(parts) != MAPS or len(blocks) != MAPS or list(blocks) != sorted(blocks) or blocks[-1] >= depth:
        raise UserError(f"method.blocks={text!r}; expected {MAPS} of the blocks 0 to {depth - 1} in their order, as "
                        "'3,5,7,11', or auto")
    return blocks


def has_small_patches(config: ConfigDict) -> bool:
    """Returns whether maps are rescaled as published for patches of 8 pixels; for smaller ones it is our choice."""
    return max(config.model.patch) <= 8


class CellNorm(nn.Module):
    """Layer norm over the channels of maps [B, h, w, C]."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, weight: jax.Array | None) -> jax.Array:
        return LayerNorm(self.dtype, name="layer")(x)


NORMS = {"batch": BatchNorm, "layer": CellNorm}


class ConvNorm(nn.Module):
    """A convolution without bias, a norm and a ReLU: maps [B, h, w, C] → [B, h, w, features]."""

    features: int
    side: int  # kernel size
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, weight: jax.Array | None) -> jax.Array:
        square = (self.side, self.side) * (self.side > 1)
        kernel = self.param("kernel", HE, (*square, x.shape[-1], self.features))
        x = x.astype(self.dtype)
        x = convolution.convolve(x, kernel) if square else linear(x, kernel, jnp.zeros(self.features, kernel.dtype))
        return jax.nn.relu(NORMS[self.norm](self.dtype, name="norm")(x, weight))


class Rescale(nn.Module):
    """Rescales maps [B, h, w, D] by 4, 2, 1, 1/2 or 1/4."""

    factor: float
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, weight: jax.Array | None) -> jax.Array:
        if self.factor < 1:
            return convolution.greatest(x, round(1 / self.factor))
        if self.factor > 1:
            x = Deconv(x.shape[-1], self.dtype, zero_bias=True, name="double")(x)
        if self.factor > 2:
            x = gelu(NORMS[self.norm](self.dtype, name="norm")(x, weight))
            x = Deconv(x.shape[-1], self.dtype, zero_bias=True, name="double_again")(x)
        return x


class Classes(nn.Module):
    """Classifies each cell: maps [B, h, w, F] → logits, float32 [B, h, w, classes], with channel dropout."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, kept: jax.Array | None) -> jax.Array:
        """Args: kept: float32 [B, F], multiplied with the channels (dropout); None: no dropout."""
        if kept is not None:
            x = x * kept[:, None, None].astype(x.dtype)
        return Head(self.classes, HEAD_STD, name="classifier")(x.astype(jnp.float32))


class UperNet(nn.Module):
    """UperNet over four maps of a ViT: pyramid pooling of the last, an FPN over all, and an auxiliary head.

    As in mmsegmentation for MAE and BEiT (UPerHead, FCNHead), where transposed convolutions upsample the maps.
    """

    classes: int
    width: int  # of the pyramid
    aux_width: int  # of the auxiliary head
    norm: str = "batch"  # or layer
    dtype: Any = jnp.float32
    factors: Sequence[float] = FACTORS

    def conv(self, name: str, side: int, features: int = 0) -> ConvNorm:
        return ConvNorm(features or self.width, side, self.norm, self.dtype, name=name)

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], weight: jax.Array | None = None,
                 kept: tuple[jax.Array | None, jax.Array | None] = (None, None)) -> tuple[jax.Array, jax.Array]:
        """Classifies the cells of the largest map.

        Args:
          maps: four maps [B, h, w, D], from early to late blocks.
          weight: in training, float32 [B], 0 for images to ignore; None in evaluation.
          kept: channel dropout of the main classifier, float32 [B, width], and of the auxiliary one,
            float32 [B, aux_width].

        Returns:
          Logits of the main classifier, float32 [B, h · f0, w · f0, C], and of the auxiliary one,
          float32 [B, h · f2, w · f2, C], where f is `factors`.
        """
        levels = [Rescale(factor, self.norm, self.dtype, name=f"rescale_{n}")(x.astype(self.dtype), weight)
                  for n, (x, factor) in enumerate(zip(maps, self.factors, strict=True))]
        sides = [level.shape[1:3] for level in levels]
        tops = [self.conv(f"lateral_{n}", 1)(level, weight) for n, level in enumerate(levels[:-1])]
        tops.append(self.pooled(levels[-1], weight))
        for n in range(len(tops) - 1, 0, -1):
            tops[n - 1] = tops[n - 1] + resampling.resize(tops[n], sides[n - 1])
        tops[:-1] = [self.conv(f"pyramid_{n}", 3)(top, weight) for n, top in enumerate(tops[:-1])]
        joined = jnp.concatenate([resampling.resize(top, sides[0]) for top in tops], -1)
        fused = self.conv("fuse", 3)(joined, weight)
        aux = self.conv("aux", 3, self.aux_width)(levels[2], weight)
        return (Classes(self.classes, name="main_classes")(fused, kept[0]),
                Classes(self.classes, name="aux_classes")(aux, kept[1]))

    def pooled(self, x: jax.Array, weight: jax.Array | None) -> jax.Array:
        """Pyramid pooling: x [B, h, w, D] and its means over grids of four sizes → maps [B, h, w, width]."""
        parts = [x]
        for n, cells in enumerate(POOLED):
            mean = self.conv(f"pool_{n}", 1)(resampling.pool(x, (cells, cells)), weight)
            parts.append(resampling.resize(mean, x.shape[1:3]))
        return self.conv("pool", 3)(jnp.concatenate(parts, -1), weight)


def flops(grid: tuple[int, int], depth_width: int, net: UperNet) -> int:
    """Returns the forward FLOPs of one image, for maps of size `grid` with `depth_width` channels."""
    cells = [int(grid[0] * factor) * int(grid[1] * factor) for factor in net.factors]
    total, width = 0, net.width
    for factor in net.factors:
        area, size = grid[0] * grid[1], factor
        while size > 1:
            total += conv_flops(area, 2, depth_width, depth_width)
            area, size = area * 4, size / 2
    total += sum(conv_flops(area, 1, depth_width, width) + conv_flops(area, 3, width, width) for area in cells[:-1])
    total += sum(conv_flops(side**2, 1, depth_width, width) for side in POOLED)
    total += conv_flops(cells[-1], 3, depth_width + len(POOLED) * width, width)
    total += conv_flops(cells[0], 3, len(cells) * width, width) + conv_flops(cells[0], 1, width, net.classes)
    return total + conv_flops(cells[2], 3, depth_width, net.aux_width) + conv_flops(cells[2], 1, net.aux_width,
                                                                                      net.classes)
