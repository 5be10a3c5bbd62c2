from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from mae_jax.data.transforms import rand_augment
from mae_jax.rng import rng

GOLDEN = dict(np.load(Path(__file__).parents[2] / "golden/augment.npz"))  # see make_augment.py beside it
CLOSE = 1  # levels: another version of Pillow may round otherwise; with the one that wrote the file it is 0
COUNT = 6000


@pytest.fixture(scope="module")
def drawn():
    return [rand_augment.draw(rng(0, "augment", position)) for position in range(COUNT)]


@pytest.mark.parametrize("key", [key for key in GOLDEN if "/timm_" in key])
def test_each_operation_is_that_of_timm(key):
    name, operation, amount = key.split("/")
    image = Image.fromarray(GOLDEN[f"picture/{name}"])
    view, mask = rand_augment.apply(image, operation.removeprefix("timm_"), float(amount))
    assert mask is None
    assert np.abs(np.asarray(view).astype(int) - GOLDEN[key]).max() <= CLOSE
    assert (np.asarray(view) != np.asarray(image)).any()


def test_there_are_fifteen_operations_and_the_golden_file_has_all():
    assert len(set(rand_augment.NAMES)) == 15
    assert {key.split("/")[1] for key in GOLDEN if "/timm_" in key} == {f"timm_{name}" for name in rand_augment.NAMES}


def test_posterising_at_full_strength_keeps_no_bit():
    image = Image.fromarray(GOLDEN["picture/chelsea"])
    assert not np.asarray(rand_augment.apply(image, "posterize", 1.0)[0]).any()


def test_two_operations_are_drawn_with_replacement_each_applied_half_of_the_time(drawn):
    times = np.bincount([len(operations) for operations in drawn], minlength=3)
    assert np.abs(times / COUNT - [1 / 4, 1 / 2, 1 / 4]).max() < 4 * np.sqrt(0.25 / COUNT)
    twice = [operations for operations in drawn if len(operations) == 2]
    same = np.mean([first[0] == second[0] for first, second in twice])
    assert abs(same - 1 / 15) < 4 * np.sqrt(1 / 15 / len(twice))


def test_the_fifteen_operations_are_equally_likely(drawn):
    names = Counter(name for operations in drawn for name, _ in operations)
    assert stats.chisquare([names[name] for name in rand_augment.NAMES]).pvalue > 1e-4


def test_magnitudes_are_normal_and_cut_at_ten_and_signs_are_fair(drawn):
    amounts = np.array([amount for operations in drawn for _, amount in operations])
    strengths, cut = np.abs(amounts), stats.norm.sf(10, 9, 0.5)
    assert strengths.max() == 1
    assert abs(np.mean(strengths == 1) - cut) < 4 * np.sqrt(cut / len(amounts))
    below = strengths[strengths < 1]
    assert stats.kstest(10 * below, stats.truncnorm(-18, 2, 9, 0.5).cdf).pvalue > 1e-4
    assert abs(np.mean(amounts > 0) - 0.5) < 4 * np.sqrt(0.25 / len(amounts))


def test_the_drawn_operations_are_applied_in_order(drawn):
    image = Image.fromarray(GOLDEN["picture/chelsea"])
    position = next(i for i, operations in enumerate(drawn) if len(operations) == 2)
    expected = image
    for name, amount in drawn[position]:
        expected, _ = rand_augment.apply(expected, name, amount)
    view, _ = rand_augment.rand_augment(image, rng(0, "augment", position))
    assert (np.asarray(view) == np.asarray(expected)).all()


@pytest.mark.parametrize("name", rand_augment.NAMES)
def test_a_mask_moves_with_its_picture_and_is_ignored_where_the_picture_left(name):
    """The mask says which of three grays a pixel had; moved by nearest neighbors both still agree."""
    coarse = np.random.default_rng(0).integers(0, 3, (6, 8), dtype=np.uint8)
    classes = Image.fromarray(coarse).resize((96, 72), Image.Resampling.NEAREST)
    image = Image.merge("RGB", [classes.point([0, 60, 240] + [0] * 253)] * 3)
    for amount in (-0.9, 0.9):
        view, mask = (np.asarray(part) for part in rand_augment.apply(image, name, amount, classes))
        if name in rand_augment.COLORS:
            assert (mask == np.asarray(classes)).all()
            continue
        left, filled = mask == 255, (view == rand_augment.FILL).all(-1)
        assert 0.05 < left.mean() < 0.6
        assert np.mean(left == filled) > 0.97
        grays = np.array([0, 60, 240])[mask[~left]]
        assert np.mean(np.abs(view[~left, 0] - grays) < 30) > 0.85
