"""Resizing of maps by linear interpolation and adaptive pooling, each as two products with constant matrices."""

import jax
import jax.numpy as jnp
import numpy as np


def linear_weights(places: np.ndarray | jax.Array, cells: int) -> np.ndarray | jax.Array:
    """Returns the weights [..., cells] of a linear interpolation between `cells` cells at places [...].

    The center of the first cell is at 0. All weights are 0 for places one cell or more beyond the outermost centers.
    """
    module = jnp if isinstance(places, jax.Array) else np
    return module.maximum(0, 1 - abs(places[..., None] - np.arange(cells)))


def interpolation(cells: int, size: int) -> np.ndarray:
    """Returns the matrix float32 [size, cells] that resizes an axis from `cells` to `size` by linear interpolation.

    The center of pixel i is at cell (i + 1/2) · cells / size - 1/2; beyond the outermost cells the edge is repeated.
    This is PyTorch's bilinear interpolation with align_corners=False, without antialiasing.
    """
    centers = np.clip((np.arange(size) + 0.5) * cells / size - 0.5, 0, cells - 1)
    return linear_weights(centers, cells).astype(np.float32)


def pooling(cells: int, size: int) -> np.ndarray:
    """Returns the matrix float32 [size, cells] of adaptive average pooling (PyTorch's AdaptiveAvgPool2d).

    Bin i is the mean of the cells floor(i · cells / size) to ceil((i + 1) · cells / size) - 1. Bins may overlap, and
    repeat if there are more bins than cells.
    """
    first, last = np.arange(size) * cells // size, -(-np.arange(1, size + 1) * cells // size)
    inside = (np.arange(cells) >= first[:, None]) & (np.arange(cells) < last[:, None])
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)


def apply(rows: np.ndarray, columns: np.ndarray, maps: jax.Array) -> jax.Array:
    """Multiplies maps [B, h, w, C] with `rows` [H, h] and `columns` [W, w]; returns float32 [B, H, W, C].

    Float32 maps are multiplied at the highest precision: the default of TPUs, bfloat16 products, would round logits.
    """
    precision = "highest" if maps.dtype == jnp.float32 else None
    tall = jnp.einsum("yh,bhwc->bywc", rows.astype(maps.dtype), maps, precision=precision,
                      preferred_element_type=jnp.float32).astype(maps.dtype)
    return jnp.einsum("xw,bywc->byxc", columns.astype(maps.dtype), tall, precision=precision,
                      preferred_element_type=jnp.float32)


def resize(maps: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes maps [B, h, w, C] to [B, *size, C] by bilinear `interpolation`, in their dtype."""
    if maps.shape[1:3] == tuple(size):
        return maps
    rows, columns = (interpolation(cells, to) for cells, to in zip(maps.shape[1:3], size, strict=True))
    return apply(rows, columns, maps).astype(maps.dtype)


def upsample(maps: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """Resizes maps of patches [B, gh, gw, C] bilinearly to pixels, float32 [B, gh · height, gw · width, C].

    `patch` is the (height, width) of a patch in pixels.
    """
    rows, columns = (cells * pixels for cells, pixels in zip(maps.shape[1:3], patch, strict=True))
    return resize(maps.astype(jnp.float32), (rows, columns))


def pool(maps: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Averages maps [B, h, w, C] over the bins of `pooling` to [B, *size, C], in their dtype."""
    rows, columns = (pooling(cells, to) for cells, to in zip(maps.shape[1:3], size, strict=True))
    return apply(rows, columns, maps).astype(maps.dtype)
