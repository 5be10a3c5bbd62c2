"""Mixup, cutmix and random erasing: timm's results where the draw is given (golden/make_timm.py), and laws of draws."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from mae_jax.ops import mixup as ops_mixup
from mae_jax.ops.patches import PatchGrid
from tests.helpers.devices import simulated
from tests.interop.parity_test import cut

PATCH = 8


def patches(pictures):
    """Pictures [B, height, width, 3] to patches of 8 x 8 pixels, [B, N, P]."""
    return cut(pictures, PATCH)


def pictures_of(values, where):
    """Patches [B, N, P] of any kind back to images [B, height, width, 3]."""
    grid = PatchGrid(where.size[0] // PATCH, where.size[1] // PATCH, PATCH, PATCH)
    order = np.tile(np.arange(grid.num_patches), (len(values), 1))
    return grid.unpatchify(np.asarray(values), order)


@pytest.fixture(scope="module")
def where():
    return ops_mixup.Pixels.of(PatchGrid(2, 3, PATCH, PATCH))  # 16 x 24 pixels


@pytest.mark.parametrize("name", ["mixup", "inside", "corner", "bottom"])
def test_mixed_pixels_and_targets_are_those_of_timm(where, name):
    with np.load(Path(__file__).parents[1] / "golden" / "timm.npz") as file:
        golden = {key.removeprefix(f"mix/{name}/"): file[key] for key in file if key.startswith(f"mix/{name}/")}
    lam, middle = golden["lam"], golden["middle"]
    kept, share = jnp.full((1, 1, 1), lam), jnp.full(1, lam)
    if len(middle):
        box, share = ops_mixup.cutmix_box(jnp.full(1, lam), tuple(middle[:, None]), where.size)
        kept = (~where.inside(box)).astype(jnp.float32)
    mixed = ops_mixup.mix(jnp.asarray(patches(golden["pictures"])), kept)
    np.testing.assert_allclose(mixed, patches(golden["mixed"]), rtol=1e-6)
    one_hot = optax.smooth_labels(jax.nn.one_hot(golden["label"], golden["target"].shape[1]), golden["smoothing"])
    np.testing.assert_allclose(ops_mixup.mix(one_hot, share), golden["target"], atol=1e-6)


def restated_box(lam, middle, size):
    """The arithmetic of timm 0.3.2 in Python's numbers: (top, bottom, left, right)."""
    box = []
    for center, side in zip(middle, size, strict=True):
        half = int(side * np.sqrt(1 - lam)) // 2
        box += [max(center - half, 0), min(center + half, side)]
    return box


def test_cutmix_boxes_are_those_of_timm_032_for_any_strength_and_place():
    rng, size = np.random.default_rng(0), (224, 160)
    lam = rng.uniform(0.001, 0.999, 500).astype(np.float32)
    middle = rng.integers(0, size, (500, 2))
    box, share = ops_mixup.cutmix_box(jnp.asarray(lam), tuple(middle.T), size)
    wanted = np.array([restated_box(one, place, size) for one, place in zip(lam, middle, strict=True)])
    np.testing.assert_array_equal(np.stack(box, 1), wanted)
    area = (wanted[:, 1] - wanted[:, 0]) * (wanted[:, 3] - wanted[:, 2])
    np.testing.assert_allclose(share, 1 - area / (size[0] * size[1]), atol=1e-6)


MIXUP, CUTMIX = 3.0, 1.0  # α; apart, so that one taken for the other shows


@pytest.fixture(scope="module")
def drawn(where):
    """(kept, share, which are cutmix) of 4,000 groups where both are on."""
    kept, share = jax.jit(lambda key: ops_mixup.draw_mix(key, 4_000, where, MIXUP, CUTMIX))(jax.random.key(0))
    kept = np.asarray(kept)
    return kept, np.asarray(share), np.isin(kept, (0, 1)).all((1, 2))


def test_cutmix_is_chosen_half_of_the_time_where_both_are_on(drawn):
    assert abs(drawn[2].mean() - 0.5) < 0.03


def test_the_share_of_labels_is_the_share_of_pixels_that_stay(drawn):
    kept, share, _ = drawn
    np.testing.assert_allclose(kept.mean((1, 2)), share, atol=1e-5)


def test_the_strength_of_mixup_is_one_number_that_follows_its_beta_law(drawn):
    kept, share, cuts = drawn
    assert (kept[~cuts] == share[~cuts, None, None]).all()
    assert stats.kstest(share[~cuts], stats.beta(MIXUP, MIXUP).cdf).statistic < 0.035
    assert abs(share[~cuts].var() - 1 / (4 * (2 * MIXUP + 1))) < 0.004


def test_shares_of_cutmix_are_those_of_boxes_of_beta_sizes_at_uniform_places(drawn, where):
    _, share, cuts = drawn
    rng = np.random.default_rng(0)
    boxes = [restated_box(rng.beta(CUTMIX, CUTMIX), rng.integers(0, where.size), where.size) for _ in range(4_000)]
    areas = [(bottom - top) * (right - left) for top, bottom, left, right in boxes]
    assert stats.ks_2samp(np.rint((1 - share[cuts]) * np.prod(where.size)), areas).statistic < 0.04


def test_boxes_lie_everywhere(drawn, where):
    holes = pictures_of(drawn[0][drawn[2]] == 0, where)[..., 0].mean(0)
    center = holes[where.size[0] // 2, where.size[1] // 2]
    assert holes.min() > 0.1  # of the corners
    assert center == pytest.approx(holes.max(), abs=0.04)
    np.testing.assert_allclose(holes[::-1, ::-1], holes, atol=0.08)


def test_every_group_has_a_draw_of_its_own(drawn):
    assert len(set(drawn[1][~drawn[2]].tolist())) > 0.99 * (~drawn[2]).sum()


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_of_one_alone_nothing_else_is_drawn(mixup, cutmix):
    where = ops_mixup.Pixels.of(PatchGrid(1, 1, PATCH, PATCH))
    kept, _ = jax.jit(lambda key: ops_mixup.draw_mix(key, 200, where, mixup, cutmix))(jax.random.key(4))
    cuts = np.isin(np.asarray(kept), (0, 1)).all((1, 2))
    assert cuts.all() if cutmix else not cuts.any()


def test_the_partner_of_a_row_is_as_far_from_the_groups_end_and_the_group_shares_one_draw():
    rng = np.random.default_rng(0)
    values, kept = rng.standard_normal((12, 6, 5)).astype(np.float32), rng.uniform(size=(3, 6, 5)).astype(np.float32)
    mixed = np.asarray(ops_mixup.mix(jnp.asarray(values), jnp.asarray(kept)))
    for row in range(12):
        group = row // 4
        partner = 4 * group + 3 - row % 4
        wanted = values[row] * kept[group] + values[partner] * (1 - kept[group])
        np.testing.assert_allclose(mixed[row], wanted, atol=1e-6)


def test_a_cut_box_is_one_rectangle_of_the_picture(drawn, where):
    for hole in pictures_of(drawn[0][drawn[2]][:200] == 0, where):
        assert_rectangle(hole)


def assert_rectangle(hole):
    """hole: bool [height, width, 3], the same in all channels."""
    assert (hole == hole[..., :1]).all()
    rows, columns = hole[..., 0].any(1), hole[..., 0].any(0)
    np.testing.assert_array_equal(hole[..., 0], np.outer(rows, columns))
    for side in (rows, columns):
        assert np.count_nonzero(np.diff(side.astype(int), prepend=0, append=0)) in (0, 2)


@pytest.fixture(scope="module")
def erased():
    """Noise of erasing on 4,000 images of 32 x 48 zeros, as images, with probability 0.25."""
    where = ops_mixup.Pixels.of(PatchGrid(4, 6, PATCH, PATCH))
    out = jax.jit(lambda key: ops_mixup.erase(key, jnp.zeros((4_000, 24, 192)), where, 0.25))(jax.random.key(7))
    return pictures_of(out, where)


def test_the_asked_share_of_pictures_is_erased(erased):
    assert abs((erased != 0).any((1, 2, 3)).mean() - 0.25) < 0.025


def test_what_is_erased_is_a_rectangle_of_standard_normal_noise(erased):
    holes = (erased != 0).any(-1, keepdims=True) & np.ones(3, bool)
    for hole in holes[holes.any((1, 2, 3))][:200]:
        assert_rectangle(hole)
    noise = erased[holes]
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert stats.kstest(noise[:20_000], "norm").statistic < 0.015


def python_box(rng, size):
    """Random Erasing's first of ten boxes that fits (1708.04896, algorithm 1, with timm's numbers)."""
    for _ in range(10):
        area, aspect = rng.uniform(0.02, 1 / 3) * size[0] * size[1], np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        height, width = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if height < size[0] and width < size[1]:
            top, left = rng.integers(0, size[0] - height + 1), rng.integers(0, size[1] - width + 1)
            return top, top + height, left, left + width
    return None


def shape_of(top, bottom, left, right):
    """Returns of boxes the top, the left, the area and the height over the width."""
    height, width = bottom - top, right - left
    return top, left, height * width, height / width


@pytest.mark.parametrize("size", [(32, 48), (64, 16)])
def test_erased_boxes_lie_inside_and_follow_the_published_law(size):
    number = 8_000
    keys = jax.random.split(jax.random.key(8))
    box, fits = ops_mixup.draw_erase_box(*keys, number, size)
    top, bottom, left, right = (np.asarray(side)[np.asarray(fits)] for side in box)
    assert min(top.min(), left.min()) == 0
    assert (bottom.max(), right.max()) == size
    assert ((bottom > top) & (right > left)).all()
    rng = np.random.default_rng(0)
    theirs = np.array([found for _ in range(number) if (found := python_box(rng, size))])
    assert abs(len(theirs) - len(top)) < 0.01 * number
    for name, ours, wanted in zip(("top", "left", "area", "aspect"), shape_of(top, bottom, left, right),
                                  shape_of(*theirs.T), strict=True):
        assert stats.ks_2samp(ours, wanted).statistic < 0.03, name


def test_a_picture_without_a_box_that_fits_stays_as_it_is():
    where = ops_mixup.Pixels.of(PatchGrid(1, 400, 1, 1))  # no box of one row is lower than the image
    pixels = jnp.ones((100, 400, 3))
    np.testing.assert_array_equal(ops_mixup.erase(jax.random.key(9), pixels, where, 1.0), pixels)


DEVICES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from mae_jax.ops import mixup
from mae_jax.ops.patches import PatchGrid
where = mixup.Pixels.of(PatchGrid(2, 3, 8, 8))
values = np.random.default_rng(0).standard_normal((32, 6, 192)).astype(np.float32)
def mixed(values):
    erased = mixup.erase(jax.random.key(1), values, where, 0.5)
    kept, share = mixup.draw_mix(jax.random.key(0), 8, where, 0.8, 1.0)
    return erased, kept, share, mixup.mix(erased, kept)
found = []
for devices in (jax.devices()[:1], jax.devices()):
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    found.append([np.asarray(x) for x in jax.jit(mixed)(jax.device_put(values, rows))])
one, eight = found
print(json.dumps({"devices": jax.device_count(), "equal": [bool((a == b).all()) for a, b in zip(one, eight)],
                  "apart": float(np.abs(one[3] - eight[3]).max()), "changed": float((one[3] != values).mean())}))
"""


@pytest.mark.slow
def test_one_and_eight_devices_draw_erase_and_mix_alike():
    done = subprocess.run([sys.executable, "-W", "error", "-c", DEVICES], env=simulated(8), capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    assert found["changed"] > 0.5
    assert all(found["equal"][:3])
    assert found["apart"] < 1e-6  # a sum of two products, which the compiler may round once or twice
