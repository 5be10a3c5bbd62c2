"""Pixels and patches: grids, normalisation, and patches back to pictures."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.errors import UserError

# Per-channel statistics of ImageNet RGB in [0, 1], as torchvision and MAE (A.1) use them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def grid(config: ConfigDict) -> tuple[int, int]:
    """Returns the number of patches along (height, width); raises UserError when a side does not divide."""
    sides = []
    for name, pixels, patch in zip(("height", "width"), config.data.image_size, config.model.patch, strict=True):
        if pixels <= 0 or pixels % patch:
            down, up = pixels // patch * patch, (pixels // patch + 1) * patch
            raise UserError(f"data.image_size: {name} {pixels} is not a multiple of the patch size {patch}; "
                            f"nearest: {up if down <= 0 else f'{down} and {up}'}")
        sides.append(pixels // patch)
    return sides[0], sides[1]


def patch_values(config: ConfigDict) -> int:
    """Returns P, the pixel values in one patch."""
    return config.model.patch[0] * config.model.patch[1] * 3


def coordinates(grid: tuple[int, int], patch: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row and the column in the picture, int32 [N, P] each, of every value of patches in raster order."""
    rows, columns = np.indices((grid[0] * patch[0], grid[1] * patch[1]), np.int32)

    def cut(values: np.ndarray) -> np.ndarray:
        tiles = values.reshape(grid[0], patch[0], grid[1], patch[1]).swapaxes(1, 2)
        return np.repeat(tiles.reshape(grid[0] * grid[1], -1), 3, axis=1)

    return cut(rows), cut(columns)


def normalize(patches: jax.Array) -> jax.Array:
    """Maps uint8 patches [..., P], channel fastest, to float32 with ImageNet's mean and deviation removed."""
    repeats = patches.shape[-1] // 3
    # One multiply-add: x / 255 / std - mean / std.
    scale = np.tile(1 / (255 * np.array(STD)), repeats).astype(np.float32)
    shift = np.tile(np.array(MEAN) / np.array(STD), repeats).astype(np.float32)
    return patches.astype(jnp.float32) * scale - shift


def denormalize(patches: np.ndarray) -> np.ndarray:
    """Inverts `normalize` on the host: float [..., P] to float32 pixel values in 0..255, not clipped."""
    repeats = patches.shape[-1] // 3
    return (patches * np.tile(STD, repeats) + np.tile(MEAN, repeats)).astype(np.float32) * 255


def assemble(patches: np.ndarray, order: np.ndarray, grid: tuple[int, int], patch: tuple[int, int]) -> np.ndarray:
    """Puts permuted patches [B, N, P] back in raster order as pictures [B, height, width, 3] (host)."""
    raster = np.empty_like(patches)
    np.put_along_axis(raster, order[..., None].astype(np.int64), patches, axis=1)
    tiles = raster.reshape(-1, *grid, *patch, 3)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, grid[0] * patch[0], grid[1] * patch[1], 3)
