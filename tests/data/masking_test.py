import json
import math
import random
from typing import NamedTuple

import jax
import numpy as np
import pytest

from mae_jax.data.masking import PatchOrder, View, _add_block, _add_published_block, check, draw, with_views
from mae_jax.errors import UserError
from mae_jax.rng import rng
from tests.helpers.tiers import slow


@pytest.mark.parametrize(("kind", "grid", "num_masked"), [
    ("random", (14, 14), 147), ("block", (14, 14), 75), ("block", (4, 6), 9), ("block", (14, 14), 196),
    ("block", (14, 14), 0), ("published_block", (14, 14), 75), ("published_block", (4, 6), 9),
    ("published_block", (14, 14), 196), ("published_block", (14, 14), 0), ("published_block", (1, 1), 1),
    ("published_block", (2, 2), 3), ("grid", (6, 4), 18), ("identity", (3, 5), 0)])
def test_an_order_is_a_permutation(kind, grid, num_masked):
    order = draw(PatchOrder(kind, grid, num_masked), rng(0, "order", 5))["order"]
    assert order.dtype == np.int32
    assert sorted(order) == list(range(grid[0] * grid[1]))


def test_random_orders_hide_every_patch_alike_often():
    order = PatchOrder("random", (4, 4), 12)
    num_masked = [draw(order, rng(0, "order", i))["order"][-12:] for i in range(2000)]
    counts = np.bincount(np.concatenate(num_masked), minlength=16)
    assert np.abs(counts / 2000 - 0.75).max() < 0.05


def hidden_mask(order, position):
    mask = np.zeros(order.grid, bool)
    permutation = draw(order, rng(0, "order", position))["order"]
    mask.flat[permutation[len(permutation) - order.num_masked:]] = True
    return mask


def pairs(mask):
    """Of the hidden patches, the share whose right neighbor is hidden."""
    return mask[:, 1:][mask[:, :-1]].mean()


@pytest.mark.parametrize("kind", ["block", "published_block"])
def test_block_orders_hide_patches_in_blocks(kind):
    """A hidden patch's right neighbor is hidden far more often than the share of hidden patches (0.4)."""
    together, scattered = (
        np.mean([pairs(hidden_mask(PatchOrder(each, (14, 14), 78), i)) for i in range(50)])
        for each in (kind, "random"))
    assert together > 0.7 > 0.5 > scattered


MASKS = 4000


def published(grid, total, draws):
    """Draws a mask as BEiT's released code is described to: it may end short of `total`."""
    mask = np.zeros(grid, bool)
    tries = 0
    while tries < 10 and mask.sum() < total:
        left, tries = total - int(mask.sum()), tries + 1
        area, aspect = draws.uniform(16, left), math.exp(draws.uniform(math.log(0.3), math.log(1 / 0.3)))
        sides = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if sides[0] < grid[0] and sides[1] < grid[1]:
            first = [draws.randint(0, whole - side) for whole, side in zip(grid, sides, strict=True)]
            place = tuple(slice(start, start + side) for start, side in zip(first, sides, strict=True))
            if 0 < (~mask[place]).sum() <= left:
                mask[place], tries = True, 0
    return mask


def unfilled(grid, total, draws):
    mask = np.zeros(grid, bool)
    while (left := total - int(mask.sum())) and _add_published_block(mask, left, draws):
        pass
    return mask


def statistics(masks):
    """Returns means of the hidden patches, of those without a hidden neighbor, of pairs of neighbors, and the share of
    hidden patches with a visible neighbor."""
    def neighbors(edge):
        wide = np.pad(masks, ((0, 0), (1, 1), (1, 1)), constant_values=edge)
        return np.stack([wide[:, :-2, 1:-1], wide[:, 2:, 1:-1], wide[:, 1:-1, :-2], wide[:, 1:-1, 2:]])

    num_masked, beside, edge = masks.sum(), neighbors(False), ~neighbors(True).all(0)
    return {"hidden": num_masked / len(masks), "isolated": (masks & ~beside.any(0)).sum() / len(masks),
            "pairs": (masks & beside).sum() / 2 / len(masks), "touching": (masks & edge).sum() / num_masked}


@pytest.mark.parametrize(("grid", "total", "known"), [
    ((14, 14), 75, {"hidden": 74.5, "isolated": 0.03, "pairs": 125.1, "touching": 0.446}),
    slow((14, 14), 147, {"isolated": 0.01}), ((7, 11), 29, {})])
def test_published_block_orders_have_the_statistics_of_beits_released_code(grid, total, known):
    """Of 4,000 masks, beside an independent drawing of its own, and what is known of 4,000 of the released code.

    The blocks alone are alike. Filling adds less than one patch on average, at the edge of what is hidden: to each
    mask at most two pairs or so, and no isolated patch.
    """
    draws = random.Random(3)
    theirs = statistics(np.stack([published(grid, total, draws) for _ in range(MASKS)]))
    blocks = statistics(np.stack([unfilled(grid, total, rng(0, "order", i)) for i in range(MASKS)]))
    ours = statistics(np.stack([hidden_mask(PatchOrder("published_block", grid, total), i) for i in range(MASKS)]))
    near = {"hidden": 0.25, "isolated": 0.012, "pairs": 0.6, "touching": 0.006}
    assert blocks == {name: pytest.approx(theirs[name], abs=near[name]) for name in near}
    for name, value in known.items():
        assert theirs[name] == pytest.approx(value, abs=near[name])
    assert ours["hidden"] == total
    assert 0 < total - blocks["hidden"] < 1
    assert ours["isolated"] < theirs["isolated"] + 0.012
    assert 0 < ours["pairs"] - blocks["pairs"] < 2 * (total - blocks["hidden"])
    assert ours["touching"] == pytest.approx(theirs["touching"], abs=0.02)


def test_published_blocks_have_the_sizes_and_places_that_are_published():
    """The first block of 75: area 16 to 75, aspect 0.3 to 1 / 0.3, shorter than the grid, at every place alike."""
    sizes, tops = [], []
    for position in range(1000):
        mask = np.zeros((14, 14), bool)
        assert _add_published_block(mask, 75, rng(0, "order", position))
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        assert len(rows) * len(columns) == mask.sum()
        sizes.append((len(rows), len(columns)))
        tops.append(rows[0] / (14 - len(rows)))
    areas, aspects = np.prod(sizes, 1), np.log([height / width for height, width in sizes])
    assert np.max(sizes) == 13
    assert 12 <= areas.min() <= 18  # rounded sides
    assert 68 <= areas.max() <= 75
    assert abs(areas.mean() - (16 + 75) / 2) < 3
    assert abs(aspects.mean()) < 0.08
    assert 0.8 < np.abs(aspects).max() < np.log(1 / 0.3) + 0.35
    assert (min(tops), max(tops)) == (0, 1)
    assert abs(np.mean(tops) - 0.5) < 0.04


def test_block_orders_hide_75_of_196_and_their_blocks_are_as_large_and_long_as_beits():
    """BEiT Algorithm 1: a block has 16 patches to what is left, its aspect lies between 0.3 and 1 / 0.3."""
    order, shapes = PatchOrder("block", (14, 14), 75), []
    masks = np.stack([hidden_mask(order, i) for i in range(400)])
    assert (masks.sum((1, 2)) == 75).all()
    middle, corners = masks[:, 6:8, 6:8].mean(), masks[:, ::13, ::13].mean()
    assert 0.5 < middle < 0.8  # blocks lie within the image: its middle is hidden more often than its corners
    assert 0.02 < corners < 0.3
    for position in range(400):
        num_masked = np.zeros((14, 14), bool)
        assert _add_block(num_masked, 75, rng(0, "order", position))
        rows, columns = (np.ptp(np.flatnonzero(num_masked.any(axis))) + 1 for axis in (1, 0))
        assert rows * columns == num_masked.sum()
        shapes.append((rows, columns))
    areas, aspects = np.prod(shapes, 1), np.log([rows / columns for rows, columns in shapes])
    assert 12 <= areas.min() <= 18  # rounded sides
    assert 68 <= areas.max() <= 75
    assert abs(areas.mean() - (16 + 75) / 2) < 4
    assert abs(aspects.mean()) < 0.12
    assert 0.8 < np.abs(aspects).max() < np.log(1 / 0.3) + 0.35


def test_block_orders_differ_between_positions():
    order = PatchOrder("block", (14, 14), 78)
    assert not np.array_equal(hidden_mask(order, 0), hidden_mask(order, 1))


def test_grid_orders_keep_one_patch_of_each_square_of_four():
    visible = ~hidden_mask(PatchOrder("grid", (4, 6), 18), 0)
    assert (visible.reshape(2, 2, 3, 2).sum((1, 3)) == 1).all()


@pytest.mark.parametrize(("order", "text"), [
    (PatchOrder("rondom", (4, 4), 8), "'rondom'.* 'random'"),
    (PatchOrder("grid", (7, 4), 21), "6 x 4 or 8 x 4"),
    (PatchOrder("grid", (4, 4), 8), "12 of 16"),
    (PatchOrder("random", (4, 4), 17), "0 to 16"),
])
def test_impossible_orders_are_refused_with_what_would_work(order, text):
    with pytest.raises(UserError, match=text):
        check(order)


class Corners(NamedTuple):
    """Two blocks that are the first columns and the first rows, the latter hidden."""

    blocks: tuple[int, int] = (2, 4)
    name: str = "corners"
    first: int = 0  # entry of the permutation
    shown: int = 2  # blocks that are returned

    def __call__(self, order, rng):
        permutation = np.concatenate([4 + rng.permutation(12), np.arange(4)])
        permutation[0] += self.first
        return permutation, np.stack([np.arange(0, 16, 4), np.arange(4)])[: self.shown]


def test_a_methods_own_generator_says_where_its_blocks_are_in_the_order():
    order = PatchOrder(Corners(), (4, 4), 4)
    check(order)
    drawn, again = (draw(order, rng(0, "order", 5)) for _ in range(2))
    assert {name: (value.shape, value.dtype) for name, value in drawn.items()} == {
        "order": ((16,), np.int32), "blocks": ((2, 4), np.int32)}
    np.testing.assert_array_equal(drawn["order"][drawn["blocks"]], [[0, 4, 8, 12], [0, 1, 2, 3]])
    np.testing.assert_array_equal(drawn["blocks"][1], [12, 13, 14, 15])
    np.testing.assert_array_equal(drawn["order"], again["order"])
    assert draw(PatchOrder(Corners(blocks=(0, 0)), (4, 4), 4), rng(0, "order", 5)).keys() == {"order"}
    assert "corners" in json.dumps(order)  # cached batches store it


@pytest.mark.parametrize(("order", "text"), [
    (PatchOrder(Corners(first=1), (4, 4), 4), "'corners' does not draw a permutation of 16"),
    (PatchOrder(Corners(shown=1), (4, 4), 4), r"\[1, 4\] of the patches 0 to 12, not \[2, 4\]"),
    (PatchOrder(Corners(), (4, 4), 4, group=2), "a group of 2"),
    (PatchOrder(Corners(), (4, 4), 17), "0 to 16"),
])
def test_an_own_generator_that_draws_no_such_order_is_refused(order, text):
    with pytest.raises(UserError, match=text):
        check(order)


def test_views_have_the_blocks_of_their_own_orders():
    names = {"patches": (16, 12), "order": (16,), "blocks": (2, 4), "label": ()}
    spec = {name: jax.ShapeDtypeStruct((8, *shape), np.int32) for name, shape in names.items()}
    views = (View("large", (8, 8), (0.4, 1), (None, None), PatchOrder(Corners(), (4, 4), 4)),
             View("small", (4, 4), (0.1, 0.4), (None,), PatchOrder("identity", (2, 2), 0)))
    assert {name: struct.shape for name, struct in with_views(spec, views).items()} == {
        "label": (8,), "large/patches": (8, 2, 16, 12), "large/order": (8, 2, 16), "large/blocks": (8, 2, 2, 4),
        "small/patches": (8, 1, 4, 12), "small/order": (8, 1, 4)}
