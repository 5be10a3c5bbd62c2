"""Semantic segmentation: upsampling of logits to pixels, and the cross-entropy per pixel."""

from functools import partial

import jax
import jax.numpy as jnp

from mae_jax.ops import resampling
from mae_jax.ops.patches import PatchGrid

IGNORED = 255  # mask value of pixels that losses and metrics ignore
MOST_STRIPS = 16  # most strips into which `over_pixels` cuts an image


def pixels(mask: jax.Array, grid: PatchGrid) -> jax.Array:
    """Puts masks of patches in raster order, [B, N, patch height · patch width], together to [B, height, width]."""
    tiles = mask.reshape(-1, *grid.shape, *grid.patch).swapaxes(2, 3)
    return tiles.reshape(-1, *grid.image_size)


def cross_entropy(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the cross-entropy of each pixel, float32 [...], for logits [..., C] and mask [...]; 0 where IGNORED.

    The true class's logit is a product with one-hot rows: the gradient of a look-up would be a scatter.
    """
    picked = (jax.nn.one_hot(mask, logits.shape[-1]) * logits).sum(-1)
    return jnp.where(mask == IGNORED, 0, jax.nn.logsumexp(logits, -1) - picked)


def over_pixels(logits: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the summed `cross_entropy` and the number of correct pixels of upsampled logits, float32 [] each.

    The logits are upsampled strip by strip, and again in the backward pass, so that those of all pixels never exist at
    once. With 150 classes at 512 x 512 pixels they would take 157 MB per image, and their gradients as much.

    Args:
      logits: [B, gh, gw, C], for any gh and gw; they are upsampled to the size of the mask.
      mask: uint8 [B, height, width]; IGNORED pixels are excluded.
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
