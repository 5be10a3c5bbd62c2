import numpy as np
import pytest

from mae_jax.data.masking import Order, _add_block, check, draw
from mae_jax.errors import UserError
from mae_jax.rng import rng


@pytest.mark.parametrize(("kind", "grid", "hidden"), [
    ("random", (14, 14), 147), ("block", (14, 14), 75), ("block", (4, 6), 9), ("block", (14, 14), 196),
    ("block", (14, 14), 0), ("grid", (6, 4), 18), ("identity", (3, 5), 0)])
def test_an_order_is_a_permutation(kind, grid, hidden):
    order = draw(Order(kind, grid, hidden), rng(0, "order", 5))
    assert order.dtype == np.int32
    assert sorted(order) == list(range(grid[0] * grid[1]))


def test_random_orders_hide_every_patch_alike_often():
    order = Order("random", (4, 4), 12)
    counts = np.bincount(np.concatenate([draw(order, rng(0, "order", i))[-12:] for i in range(2000)]), minlength=16)
    assert np.abs(counts / 2000 - 0.75).max() < 0.05


def hidden_mask(order, position):
    mask = np.zeros(order.grid, bool)
    mask.flat[draw(order, rng(0, "order", position))[order.grid[0] * order.grid[1] - order.hidden:]] = True
    return mask


def pairs(mask):
    """Of the hidden patches, the share whose right neighbour is hidden."""
    return mask[:, 1:][mask[:, :-1]].mean()


def test_block_orders_hide_patches_in_blocks():
    """A hidden patch's right neighbour is hidden far more often than the share of hidden patches (0.4)."""
    together, scattered = (
        np.mean([pairs(hidden_mask(Order(kind, (14, 14), 78), i)) for i in range(50)]) for kind in ("block", "random"))
    assert together > 0.7 > 0.5 > scattered


def test_block_orders_hide_75_of_196_and_their_blocks_are_as_large_and_long_as_beits():
    """BEiT Algorithm 1: a block has 16 patches to what is left, its aspect lies between 0.3 and 1 / 0.3."""
    order, shapes = Order("block", (14, 14), 75), []
    masks = np.stack([hidden_mask(order, i) for i in range(400)])
    assert (masks.sum((1, 2)) == 75).all()
    middle, corners = masks[:, 6:8, 6:8].mean(), masks[:, ::13, ::13].mean()
    assert 0.5 < middle < 0.8  # blocks lie within the picture: its middle is hidden more often than its corners
    assert 0.02 < corners < 0.3
    for position in range(400):
        hidden = np.zeros((14, 14), bool)
        assert _add_block(hidden, 75, rng(0, "order", position))
        rows, columns = (np.ptp(np.flatnonzero(hidden.any(axis))) + 1 for axis in (1, 0))
        assert rows * columns == hidden.sum()
        shapes.append((rows, columns))
    areas, aspects = np.prod(shapes, 1), np.log([rows / columns for rows, columns in shapes])
    assert 12 <= areas.min() <= 18  # rounded sides
    assert 68 <= areas.max() <= 75
    assert abs(areas.mean() - (16 + 75) / 2) < 4
    assert abs(aspects.mean()) < 0.12
    assert 0.8 < np.abs(aspects).max() < np.log(1 / 0.3) + 0.35


def test_block_orders_differ_between_positions():
    order = Order("block", (14, 14), 78)
    assert not np.array_equal(hidden_mask(order, 0), hidden_mask(order, 1))


def test_grid_orders_keep_one_patch_of_each_square_of_four():
    visible = ~hidden_mask(Order("grid", (4, 6), 18), 0)
    assert (visible.reshape(2, 2, 3, 2).sum((1, 3)) == 1).all()


@pytest.mark.parametrize(("order", "text"), [
    (Order("rondom", (4, 4), 8), "'rondom'.* 'random'"),
    (Order("grid", (7, 4), 21), "6 x 4 or 8 x 4"),
    (Order("grid", (4, 4), 8), "12 of 16"),
    (Order("random", (4, 4), 17), "0 to 16"),
])
def test_impossible_orders_are_refused_with_what_would_work(order, text):
    with pytest.raises(UserError, match=text):
        check(order)
