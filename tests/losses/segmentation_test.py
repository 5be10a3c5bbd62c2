"""Patches to pixels, against scipy and scikit-image, and the loss of a pixel against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage
import skimage.transform

from mae_jax.losses import segmentation
from mae_jax.ops import resampling
from mae_jax.ops.patches import PatchGrid


def test_masks_of_patches_come_together_as_pixels():
    whole = np.arange(2 * 6 * 8).reshape(2, 6, 8)
    tiles = [[whole[i, y:y + 3, x:x + 2].ravel() for y in (0, 3) for x in (0, 2, 4, 6)] for i in range(2)]
    np.testing.assert_array_equal(segmentation.pixels(jnp.asarray(tiles), PatchGrid(2, 4, 3, 2)), whole)


@pytest.mark.parametrize(("grid", "patch"), [((3, 5), (4, 4)), ((14, 14), (16, 16)), ((2, 3), (7, 2)),
                                             ((1, 4), (3, 1))])
def test_upsampling_is_bilinear_about_pixel_centers_with_the_edge_repeated(grid, patch):
    logits = np.random.default_rng(0).normal(size=(2, *grid, 3)).astype(np.float32)
    found = resampling.upsample(logits, patch)
    size = grid[0] * patch[0], grid[1] * patch[1]
    assert found.shape == (2, *size, 3)
    centers = np.meshgrid(*((np.arange(n) + 0.5) / p - 0.5 for n, p in zip(size, patch, strict=True)), indexing="ij")
    for picture, wanted in zip(np.asarray(found), logits, strict=True):
        for channel in range(3):
            peer = scipy.ndimage.map_coordinates(wanted[..., channel], centers, order=1, mode="nearest")
            np.testing.assert_allclose(picture[..., channel], peer, atol=1e-5)
        peer = skimage.transform.resize(wanted, size, order=1, mode="edge", anti_aliasing=False)
        np.testing.assert_allclose(picture, peer, atol=1e-5)


def test_upsampling_keeps_float32_whatever_the_logits_are():
    logits = jnp.arange(8, dtype=jnp.bfloat16).reshape(1, 2, 2, 2)
    assert resampling.upsample(logits, (4, 4)).dtype == jnp.float32


@pytest.mark.parametrize("size", [(12, 20), (7, 5)])
def test_sums_over_pixels_made_strip_by_strip_are_those_of_the_whole_and_so_are_gradients(size):
    rng = np.random.default_rng(0)
    logits, mask = rng.normal(size=(3, 4, 5, 6)).astype(np.float32) * 5, rng.integers(6, size=(3, *size))
    mask = np.where(rng.random(mask.shape) < 0.3, segmentation.IGNORED, mask).astype(np.uint8)
    (loss, right), slopes = jax.value_and_grad(segmentation.over_pixels, has_aux=True)(jnp.asarray(logits), mask)
    whole = resampling.resize(jnp.asarray(logits), size)
    wanted, wanted_slopes = jax.value_and_grad(
        lambda x: segmentation.cross_entropy(resampling.resize(x, size), mask).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(slopes, wanted_slopes, atol=1e-4)
    assert right == (whole.argmax(-1) == mask).sum()


def test_the_loss_of_a_pixel_is_the_cross_entropy_and_zero_where_it_is_ignored():
    rng = np.random.default_rng(0)
    logits, mask = rng.normal(size=(3, 4, 5, 6)).astype(np.float32) * 5, rng.integers(6, size=(3, 4, 5))
    mask[rng.random(mask.shape) < 0.3] = segmentation.IGNORED
    wanted = optax.softmax_cross_entropy_with_integer_labels(logits, np.minimum(mask, 5))
    losses, slopes = jax.value_and_grad(lambda x: segmentation.cross_entropy(x, mask).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(losses, wanted[mask < 255].sum(), rtol=1e-5)
    assert not slopes[mask == 255].any()
