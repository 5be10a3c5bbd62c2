"""Maps of other sizes, against scipy and plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from mae_jax.ops import resampling


@pytest.mark.parametrize(("size", "to"), [((3, 6), (16, 16)), ((16, 16), (3, 6)), ((5, 7), (11, 4)), ((1, 4), (3, 4))])
def test_resizing_is_bilinear_about_cell_centers_with_the_edge_repeated(size, to):
    maps = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    found = resampling.resize(jnp.asarray(maps), to)
    centers = np.meshgrid(*((np.arange(n) + 0.5) * have / n - 0.5 for n, have in zip(to, size, strict=True)),
                          indexing="ij")
    for image, wanted in zip(np.asarray(found), maps, strict=True):
        for channel in range(3):
            peer = scipy.ndimage.map_coordinates(wanted[..., channel], centers, order=1, mode="nearest")
            np.testing.assert_allclose(image[..., channel], peer, atol=1e-5)


@pytest.mark.parametrize(("cells", "bins"), [(16, 1), (16, 2), (16, 3), (16, 6), (2, 3), (1, 6), (7, 7)])
def test_bins_are_means_of_the_cells_that_they_touch(cells, bins):
    maps = np.random.default_rng(0).normal(size=(1, cells, cells, 2)).astype(np.float32)
    found = np.asarray(resampling.pool(jnp.asarray(maps), (bins, bins)))[0]
    edges = [(int(np.floor(i * cells / bins)), int(np.ceil((i + 1) * cells / bins))) for i in range(bins)]
    for i, (top, bottom) in enumerate(edges):
        for j, (left, right) in enumerate(edges):
            np.testing.assert_allclose(found[i, j], maps[0, top:bottom, left:right].mean((0, 1)), atol=1e-5)


def test_maps_keep_their_dtype():
    maps = jnp.ones((1, 4, 4, 2), jnp.bfloat16)
    assert resampling.resize(maps, (8, 8)).dtype == jnp.bfloat16
    assert resampling.pool(maps, (3, 3)).dtype == jnp.bfloat16
