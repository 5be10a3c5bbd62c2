"""Maps of several strides out of a plain ViT's one: ViTDet's simple pyramid, and a feature pyramid of four blocks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.models.map_norms import map_norm
from mae_jax.ops.convolution import convolve, double, greatest, transposed
from mae_jax.ops.linear import gelu, linear


def uniform(bound: float) -> nn.initializers.Initializer:
    """Returns what draws from -bound to bound."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def kernel_start(how: str, inputs: int, outputs: int) -> nn.initializers.Initializer:
    """Returns the first values of a kernel that sums over so many inputs for so many outputs, cells included.

    Args:
      how: 'torch', as torch starts convolutions; 'msra' (arXiv 1502.01852, by outputs) and 'xavier' (uniform, by
        inputs) as Detectron2 fills them; or a number: the standard deviation of a normal.
    """
    if how == "msra":
        return nn.initializers.normal((2 / outputs) ** 0.5)
    bounds = {"torch": inputs**-0.5, "xavier": (3 / inputs) ** 0.5}
    return uniform(bounds[how]) if how in bounds else nn.initializers.normal(float(how))


class Conv(nn.Module):
    """A convolution over maps [B, H, W, C] that keeps their size; a bias starts at 0, or as torch does."""

    features: int
    size: int
    dtype: Any
    start: str
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cells, channels = self.size**2, x.shape[-1]
        first_values = kernel_start(self.start, cells * channels, cells * self.features)
        kernel = self.param("kernel", first_values, (self.size, self.size, channels, self.features))
        first = uniform((cells * channels) ** -0.5) if self.start == "torch" else nn.initializers.zeros
        bias = self.param("bias", first, (self.features,)) if self.bias else jnp.zeros(self.features, kernel.dtype)
        x = x.astype(self.dtype)
        if self.size == 1:
            return linear(x, kernel[0, 0], bias)
        return convolve(x, kernel) + bias.astype(x.dtype)


class Deconv(nn.Module):
    """A transposed convolution of 2 x 2 cells at stride 2: maps [B, H, W, C] → [B, 2 H, 2 W, F]."""

    features: int
    dtype: Any
    start: str = "torch"
    zero_bias: bool = False  # at the start, where torch draws it

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # torch counts a transposed kernel's inputs and outputs the other way around.
        first_values = kernel_start(self.start, 4 * self.features, 4 * x.shape[-1])
        kernel = self.param("kernel", first_values, (x.shape[-1], 2, 2, self.features))
        drawn = self.start == "torch" and not self.zero_bias
        first = uniform((4 * self.features) ** -0.5) if drawn else nn.initializers.zeros
        bias = self.param("bias", first, (self.features,))
        return transposed(x.astype(self.dtype), kernel, bias)


class Scale(nn.Module):
    """A map [B, H, W, D] at 4, 2, 1 or 1/2 times its size; with `narrow`, each doubling halves the channels (ViTDet).
    """

    scale: float
    narrow: bool
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        if self.scale == 0.5:
            return greatest(x)
        for number in range(int(np.log2(self.scale))):
            if number:
                x = gelu(map_norm(self.norm, self.dtype, "norm")(x, weight))
            width = width // 2 if self.narrow else width
            x = Deconv(width, self.dtype, name=f"deconv{number + 1}")(x)
        return x


class Pyramid(nn.Module):
    """What makes maps [B, H · s, W · s, width] for each of the scales s out of those of blocks [B, H, W, D].

    It gives `extra` more, each every second cell of the one before. In training a batch norm takes a weight, float32
    [B], 0 for images that do not count.
    """

    scales: tuple[float, ...]
    extra: int
    width: int
    norm: str
    dtype: Any


class SimplePyramid(Pyramid):
    """ViTDet's pyramid (arXiv 2203.16527, section 3): each map is made of the last block's, and of no other."""

    @nn.compact
    def __call__(self, maps: list[jax.Array], weight: jax.Array | None = None) -> list[jax.Array]:
        found = []
        for number, scale in enumerate(self.scales):
            x = Scale(scale, True, self.norm, self.dtype, name=f"scale{number}")(maps[-1], weight)
            for name, size in (("lateral", 1), ("output", 3)):
                x = Conv(self.width, size, self.dtype, "torch", self.norm == "none", name=f"{name}{number}")(x)
                x = map_norm(self.norm, self.dtype, f"{name}{number}_norm")(x, weight)
            found.append(x)
        return with_extra(found, self.extra)


class FeaturePyramid(Pyramid):
    """A feature pyramid (arXiv 1612.03144) of maps of several blocks, one for each scale (2111.11429, section 3).

    Coarse maps are added to finer ones.
    """

    @nn.compact
    def __call__(self, maps: list[jax.Array], weight: jax.Array | None = None) -> list[jax.Array]:
        laterals = []
        for number, (x, scale) in enumerate(zip(maps, self.scales, strict=True)):
            x = Scale(scale, False, "group", self.dtype, name=f"scale{number}")(x, weight)
            x = Conv(self.width, 1, self.dtype, "xavier", self.norm == "none", name=f"lateral{number}")(x)
            laterals.append(map_norm(self.norm, self.dtype, f"lateral{number}_norm")(x, weight))
        found: list[jax.Array] = []
        for number in reversed(range(len(laterals))):
            x = laterals[number]
            laterals[number] = x = x + double(laterals[number + 1]) if number + 1 < len(laterals) else x
            x = Conv(self.width, 3, self.dtype, "xavier", self.norm == "none", name=f"output{number}")(x)
            found.insert(0, map_norm(self.norm, self.dtype, f"output{number}_norm")(x, weight))
        return with_extra(found, self.extra)


def with_extra(maps: list[jax.Array], extra: int) -> list[jax.Array]:
    """Returns the maps and so many more, each every second cell of the one before."""
    for _ in range(extra):
        maps = [*maps, maps[-1][:, ::2, ::2]]
    return maps


PYRAMIDS = {"simple": SimplePyramid, "blocks": FeaturePyramid}
