"""Multi-scale feature maps from a plain ViT: ViTDet's simple pyramid, and an FPN over several blocks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.models.map_norms import map_norm
from mae_jax.ops.convolution import convolve, double, greatest, transposed
from mae_jax.ops.linear import gelu, linear


def uniform(bound: float) -> nn.initializers.Initializer:
    """Returns an initializer that draws uniformly from [-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def kernel_start(how: str, inputs: int, outputs: int) -> nn.initializers.Initializer:
    """Returns the initializer of a kernel.

    Args:
      how: 'torch', torch's default for convolutions; 'msra' (arXiv 1502.01852, normal, by fan-out) or 'xavier'
        (uniform, by fan-in), as in Detectron2; or the standard deviation of a normal distribution, as a text.
      inputs: fan-in, kernel size included.
      outputs: fan-out, kernel size included.
    """
    if how == "msra":
        return nn.initializers.normal((2 / outputs) ** 0.5)
    bounds = {"torch": inputs**-0.5, "xavier": (3 / inputs) ** 0.5}
    return uniform(bounds[how]) if how in bounds else nn.initializers.normal(float(how))


class Conv(nn.Module):
    """A convolution of maps, [B, H, W, C] → [B, H, W, F]; the bias starts at 0, or for start='torch' as in torch."""

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
    """A 2 x 2 transposed convolution with stride 2: maps [B, H, W, C] → [B, 2 H, 2 W, F]."""

    features: int
    dtype: Any
    start: str = "torch"
    zero_bias: bool = False  # initialize the bias to 0 where torch draws it

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # torch swaps fan-in and fan-out of a transposed kernel.
        first_values = kernel_start(self.start, 4 * self.features, 4 * x.shape[-1])
        kernel = self.param("kernel", first_values, (x.shape[-1], 2, 2, self.features))
        drawn = self.start == "torch" and not self.zero_bias
        first = uniform((4 * self.features) ** -0.5) if drawn else nn.initializers.zeros
        bias = self.param("bias", first, (self.features,))
        return transposed(x.astype(self.dtype), kernel, bias)


class Scale(nn.Module):
    """Rescales maps [B, H, W, D] by 4, 2, 1 or 1/2; with `narrow`, each doubling halves the channels (ViTDet)."""

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
    """Base class: from maps of blocks [B, H, W, D], returns maps [B, H · s, W · s, width] for each scale s.

    `extra` more maps follow, each with every second cell of the previous one. In training, a batch norm takes `weight`,
    float32 [B], 0 for images to ignore.
    """

    scales: tuple[float, ...]
    extra: int
    width: int
    norm: str
    upsampling_norm: str  # of the FPN, in its maps that are upsampled 4 times
    dtype: Any


class SimplePyramid(Pyramid):
    """ViTDet's simple feature pyramid (arXiv 2203.16527, section 3): all maps come from the last block's map."""

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
    """An FPN (arXiv 1612.03144) over maps of several blocks, one for each scale (arXiv 2111.11429, section 3).

    Each coarse map is upsampled and added to the next finer one.
    """

    @nn.compact
    def __call__(self, maps: list[jax.Array], weight: jax.Array | None = None) -> list[jax.Array]:
        laterals = []
        for number, (x, scale) in enumerate(zip(maps, self.scales, strict=True)):
            x = Scale(scale, False, self.upsampling_norm, self.dtype, name=f"scale{number}")(x, weight)
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
    """Appends `extra` maps to maps [B, H, W, C], each with every second row and column of the previous one."""
    for _ in range(extra):
        maps = [*maps, maps[-1][:, ::2, ::2]]
    return maps


PYRAMIDS = {"simple": SimplePyramid, "blocks": FeaturePyramid}
