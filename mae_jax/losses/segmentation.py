"""Pixels that have a class: masks and logits of patches to pixels, and the loss over them."""

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops.patches import PatchGrid

IGNORED = 255  # of a mask: pixels that count nowhere


def pixels(mask: jax.Array, grid: PatchGrid) -> jax.Array:
    """Puts masks [B, N, p·p] of patches in raster order together to [B, height, width]."""
    tiles = mask.reshape(-1, *grid.shape, *grid.patch).swapaxes(2, 3)
    return tiles.reshape(-1, *grid.image_size)


def interpolation(cells: int, factor: int) -> np.ndarray:
    """Returns the float32 matrix [cells · factor, cells] that enlarges a side linearly.

    The centre of pixel i is (i + 1/2) / factor - 1/2 in cells; past the outermost centres the edge is repeated. This is
    what PyTorch calls bilinear without align_corners.
    """
    centers = np.clip((np.arange(cells * factor) + 0.5) / factor - 0.5, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(centers[:, None] - np.arange(cells))).astype(np.float32)


def upsample(logits: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """Enlarges logits of patches [B, gh, gw, C] bilinearly to pixels float32 [B, gh · height, gw · width, C].

    Two small matrix products; `patch` is (height, width) in pixels.
    """
    rows, columns = (interpolation(cells, size) for cells, size in zip(logits.shape[1:3], patch, strict=True))
    # Products in bfloat16, the default of TPUs, would round the logits.
    tall = jnp.einsum("yh,bhwc->bywc", rows, logits.astype(jnp.float32), precision="highest")
    return jnp.einsum("xw,bywc->byxc", columns, tall, precision="highest")


def cross_entropy(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns float32 [...]: the cross-entropy of each pixel of logits [..., C] and mask [...]; 0 where it is ignored.

    The picked logit is a product with one-hot rows: the gradient of a look-up would be a scatter.
    """
    picked = (jax.nn.one_hot(mask, logits.shape[-1]) * logits).sum(-1)
    return jnp.where(mask == IGNORED, 0, jax.nn.logsumexp(logits, -1) - picked)
