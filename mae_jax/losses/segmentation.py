"""Pixels that have a class: masks and logits of patches to pixels, and the loss over them."""

from functools import partial

import jax
import jax.numpy as jnp

from mae_jax.ops import resampling
from mae_jax.ops.patches import PatchGrid

IGNORED = 255  # of a mask: pixels that count nowhere
MOST_STRIPS = 16  # into which `over_pixels` cuts an image


def pixels(mask: jax.Array, grid: PatchGrid) -> jax.Array:
    """Puts masks [B, N, p·p] of patches in raster order together to [B, height, width]."""
    tiles = mask.reshape(-1, *grid.shape, *grid.patch).swapaxes(2, 3)
    return tiles.reshape(-1, *grid.image_size)


def upsample(logits: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """Enlarges logits of patches [B, gh, gw, C] bilinearly to pixels float32 [B, gh · height, gw · width, C].

    `patch` is (height, width) in pixels.
    """
    rows, columns = (cells * pixels for cells, pixels in zip(logits.shape[1:3], patch, strict=True))
    return resampling.resize(logits.astype(jnp.float32), (rows, columns))


def cross_entropy(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns float32 [...]: the cross-entropy of each pixel of logits [..., C] and mask [...]; 0 where it is ignored.

    The picked logit is a product with one-hot rows: the gradient of a look-up would be a scatter.
    """
    picked = (jax.nn.one_hot(mask, logits.shape[-1]) * logits).sum(-1)
    return jnp.where(mask == IGNORED, 0, jax.nn.logsumexp(logits, -1) - picked)


def over_pixels(logits: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of `cross_entropy`, and how many pixels are right, of logits that are upsampled to the mask.

    The logits of all pixels never exist at once: they are made strip by strip, and once more in the backward pass. Of
    150 classes at 512 x 512, they would take 157 MB for each image, and as much for each of their gradients.

    Args:
      logits: [B, gh, gw, C], of any size.
      mask: uint8 [B, height, width]; 255 is ignored.
    """
    height, width = mask.shape[1:]
    rows, columns = (resampling.interpolation(cells, size) for cells, size in
                     zip(logits.shape[1:3], (height, width), strict=True))
    strips = max(n for n in range(1, MOST_STRIPS + 1) if height % n == 0)

    @partial(jax.checkpoint, prevent_cse=False)
    def strip(logits: jax.Array, rows: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = resampling.apply(rows, columns, logits)
        right = (found.argmax(-1) == mask).sum(dtype=jnp.float32)
        return cross_entropy(found, mask).sum(), right

    logits = logits.astype(jnp.float32)
    parts = mask.reshape(len(mask), strips, height // strips, width).swapaxes(0, 1)
    sums = jax.lax.map(lambda part: strip(logits, *part), (rows.reshape(strips, height // strips, -1), parts))
    return sums[0].sum(), sums[1].sum()
