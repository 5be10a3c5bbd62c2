"""Position embeddings of other grids, beside torch's bicubic interpolation (golden/make_torch.py)."""

from pathlib import Path

import numpy as np
import pytest

from mae_jax.ops.pos_embed import cubic, resize

GRIDS = [((14, 14), (24, 24)), ((14, 14), (12, 10)), ((7, 7), (14, 14))]


@pytest.mark.parametrize(("grid", "to"), GRIDS)
def test_resized_positions_are_those_of_torch(grid, to):
    name = f"positions/{grid[0]}x{grid[1]}/{to[0]}x{to[1]}"
    with np.load(Path(__file__).parents[1] / "golden" / "torch.npz") as file:
        before, after = file[f"{name}/from"], file[f"{name}/to"]
    found = resize(before, grid, to)
    assert (found.dtype, found.shape) == (np.float32, (to[0] * to[1], 3))
    np.testing.assert_allclose(found, after, rtol=0, atol=1e-6)


def test_the_same_grid_leaves_positions_as_they_are():
    table = np.random.default_rng(0).standard_normal((15, 4)).astype(np.float32)
    np.testing.assert_array_equal(resize(table, (3, 5), (3, 5)), table)


@pytest.mark.parametrize(("size", "to"), [(14, 24), (14, 5), (1, 6)])
def test_the_weights_of_a_place_sum_to_one_so_that_a_constant_stays(size, to):
    np.testing.assert_allclose(cubic(size, to).sum(1), np.ones(to), atol=1e-12)


def test_rows_and_columns_are_not_mixed_up():
    rows = np.repeat(np.arange(4.0), 6)[:, None].astype(np.float32)  # the row's number, on a grid of 4 x 6
    found = resize(rows, (4, 6), (8, 3)).reshape(8, 3)
    assert (np.ptp(found, axis=1) < 1e-6).all()
    assert (np.diff(found[:, 0]) > 0).all()


def test_a_table_that_is_no_such_grid_is_refused():
    with pytest.raises(ValueError, match=r"15 positions .*4 x 4"):
        resize(np.zeros((15, 2)), (4, 4), (8, 8))
