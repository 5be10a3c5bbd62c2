from collections import Counter
from importlib import util
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from mae_jax.data.transforms import color
from mae_jax.rng import rng

GOLDEN = dict(np.load(Path(__file__).parents[2] / "golden/augment.npz"))  # see make_augment.py beside it
CLOSE = 1  # levels: another version of Pillow may round otherwise; with the one that wrote the file it is 0


def photograph(name):
    folder = Path(util.find_spec("skimage").origin).parent / "data"
    return Image.open(folder / f"{name}.png").convert("RGB").reduce(4)


def differ(image, expected):
    return np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max()


@pytest.mark.parametrize("key", [key for key in GOLDEN if "/adjust_" in key])
def test_each_change_of_the_jitter_is_that_of_torchvision(key):
    name, operation, amount = key.split("/")
    image = Image.fromarray(GOLDEN[f"picture/{name}"])
    assert differ(color.adjust(image, operation.removeprefix("adjust_"), float(amount)), GOLDEN[key]) <= CLOSE


@pytest.mark.parametrize("name", ["astronaut", "chelsea"])
@pytest.mark.parametrize(("change", "key"), [(color.gray, "grey/0"), (color.solarize, "solarise/128")])
def test_gray_and_solarized_pictures_are_those_of_torchvision(name, change, key):
    image = Image.fromarray(GOLDEN[f"picture/{name}"])
    assert differ(change(image, rng(0, "augment", 0)), GOLDEN[f"{name}/{key}"]) <= CLOSE


def test_solarizing_inverts_from_128_on():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert("RGB")
    solarized = np.asarray(color.solarize(ramp, rng(0, "augment", 0)))[0, :, 0]
    assert solarized.tolist() == [*range(128), *range(127, -1, -1)]


def test_the_blur_is_a_gaussian_of_up_to_two_pixels():
    """Pillow's Gaussian, three box filters, is within a level of scipy's in the mean, away from the edges."""
    image, widths = photograph("coffee"), []
    sharp = np.asarray(image).astype(float)
    scales = np.linspace(0.1, 2, 39)
    truth = [ndimage.gaussian_filter(sharp, (scale, scale, 0))[8:-8, 8:-8] for scale in scales]
    for position in range(60):
        blurred = np.asarray(color.blur(image, rng(0, "augment", position)))[8:-8, 8:-8]
        errors = [np.abs(blurred - at_scale).mean() for at_scale in truth]
        assert min(errors) < 1
        widths.append(scales[int(np.argmin(errors))])
    assert abs(np.mean(widths) - 1.05) < 0.3
    assert min(widths) < 0.5
    assert max(widths) > 1.7


def test_a_whole_turn_of_the_hue_changes_nothing_and_a_third_swaps_the_primaries():
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    green = np.asarray(color.adjust(red, "hue", 1 / 3))[0, 0]
    assert green.argmax() == 1
    assert green[1] > 250


def test_jitter_changes_colors_within_its_strengths():
    image = Image.new("RGB", (4, 4), (100, 120, 140))
    views = np.array([np.asarray(color.jitter(image, rng(0, "augment", i)))[0, 0] for i in range(300)])
    means = views.mean(1)
    assert 120 * 0.5 < means.min() < 85
    assert 155 < means.max() < 120 * 1.5
    assert np.ptp(views, axis=1).std() > 5  # saturation too


@pytest.fixture
def changes(monkeypatch):
    """What was changed, and by how much, in order, by all calls since."""
    made = []
    monkeypatch.setattr(color, "adjust", lambda image, name, amount: made.append((name, amount)) or image)
    return made


@pytest.mark.parametrize(("strengths", "names"), [
    (color.MAE_JITTER, ("brightness", "contrast", "saturation", "hue")),
    (color.THREE_JITTER, ("brightness", "contrast", "saturation"))])
def test_jitter_makes_each_change_once_in_any_order_by_uniform_amounts(changes, strengths, names):
    image, count, orders = Image.new("RGB", (1, 1)), 2400, Counter()
    for position in range(count):
        color.jitter(image, rng(0, "augment", position), strengths)
        orders[tuple(name for name, _ in changes[-len(names):])] += 1
    assert set(orders) == set(permutations(names))
    expected = count / len(orders)
    assert max(abs(times - expected) for times in orders.values()) < 4.5 * np.sqrt(expected)
    for name in names:
        amounts = np.array([amount for changed, amount in changes if changed == name]) / strengths[name]
        assert np.abs(np.quantile(amounts, [0, 0.25, 0.5, 0.75, 1]) - [-1, -0.5, 0, 0.5, 1]).max() < 0.08


def test_three_makes_exactly_one_of_its_three_changes_each_a_third_of_the_time(changes):
    """With the jitter held still, every view is gray, solarized or blurred, and which one can be seen."""
    image, seen = photograph("astronaut"), Counter()
    gray, inverted = (np.asarray(change(image, None)) for change in (color.gray, color.solarize))
    for position in range(600):
        view = np.asarray(color.three(image, rng(0, "augment", position)))
        kind = "grey" if (view == gray).all() else "solarised" if (view == inverted).all() else "blurred"
        seen[kind] += 1
        if kind == "blurred":
            assert np.abs(view.mean((0, 1)) - np.asarray(image).mean((0, 1))).max() < 1
    assert len(changes) == 3 * 600
    assert set(seen) == {"grey", "solarised", "blurred"}
    assert max(abs(times - 200) for times in seen.values()) < 4 * np.sqrt(600 * 2 / 9)


def test_three_changes_the_jitter_last():
    """A gray view stays gray under the jitter, and most of these views do not have the gray levels of the image."""
    image = photograph("astronaut")
    gray = np.asarray(color.gray(image, None))
    views = [np.asarray(color.three(image, rng(0, "augment", position))) for position in range(60)]
    grays = [view for view in views if (view == view[..., :1]).all()]
    assert 8 < len(grays) < 35
    assert all((view != gray).any() for view in grays)


def test_none_leaves_the_picture():
    image = photograph("chelsea")
    assert color.COLOR_POLICIES["none"](image, rng(0, "augment", 0)) is image
