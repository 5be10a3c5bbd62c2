"""Pixels that have a class: masks and logits of patches to pixels, and the loss over them."""

import jax
import jax.numpy as jnp

IGNORED = 255  # of a mask: pixels that count nowhere


def pixels(mask: jax.Array, grid: tuple[int, int], patch: tuple[int, int]) -> jax.Array:
    """Puts masks [B, N, p·p] of patches in raster order together to [B, height, width]."""
    tiles = mask.reshape(-1, *grid, *patch).swapaxes(2, 3)
    return tiles.reshape(-1, grid[0] * patch[0], grid[1] * patch[1])


def upsample(x: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """Returns float32 [B, height, width, C] for [B, rows, columns, C] of patches: bilinear between their centres."""
    images, rows, columns, channels = x.shape
    shape = (images, rows * patch[0], columns * patch[1], channels)
    return jax.image.resize(x.astype(jnp.float32), shape, "bilinear")


def cross_entropy(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns float32 [...]: the cross-entropy of each pixel of logits [..., C] and mask [...]; 0 where it is ignored.

    The picked logit is a product with one-hot rows: the gradient of a look-up would be a scatter.
    """
    picked = (jax.nn.one_hot(mask, logits.shape[-1]) * logits).sum(-1)
    return jnp.where(mask == IGNORED, 0, jax.nn.logsumexp(logits, -1) - picked)


def confusion(predicted: jax.Array, truth: jax.Array, classes: int) -> jax.Array:
    """Returns int32 [C, C]: how many pixels of each true class (rows) are predicted as each class (columns).

    Args:
      predicted: integers [...] from 0 to C - 1.
      truth: integers [...]; IGNORED counts nowhere.
      classes: C.
    """
    known = truth != IGNORED
    pairs = jnp.where(known, truth.astype(jnp.int32) * classes + predicted, classes**2)
    return jnp.bincount(pairs.ravel(), length=classes**2 + 1)[:-1].reshape(classes, classes)
