from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_jax.config import default
from mae_jax.data.decode import BadImage, StoredImage
from mae_jax.data.transforms import crop as transforms_crop
from mae_jax.data.transforms.crop import random_box
from mae_jax.rng import rng

GOLDEN = dict(np.load(Path(__file__).parents[2] / "golden/augment.npz"))  # see make_augment.py beside it


def settings(**fields):
    config = default()
    config.data.update({"image_size": (32, 32), **fields})
    return config


def noise(height, width):
    """Noise with coarse structure."""
    coarse = np.random.default_rng(0).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def view_of(pixels, position, config):
    """The training view without a mask."""
    view, mask = transforms_crop.augment(StoredImage(pixels), rng(0, "augment", position), config)
    assert mask is None
    return view


def draw_boxes(size, count, target=(224, 224)):
    return [random_box(rng(0, "augment", i), size, target, (0.2, 1.0), (3 / 4, 4 / 3)) for i in range(count)]


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (64, 64)])
def test_random_boxes_keep_to_scale_and_ratio_and_cover_both_ranges(size):
    boxes = draw_boxes(size, 2000)
    areas = np.array([b.height * b.width for b in boxes]) / (size[0] * size[1])
    ratios = np.array([b.width / b.height for b in boxes])
    assert areas.min() > 0.18
    assert areas.max() <= 1
    assert areas.min() < 0.25
    assert areas.max() > 0.9
    assert ratios.min() > 0.72
    assert ratios.max() < 1.39
    assert ratios.min() < 0.8
    assert ratios.max() > 1.25
    assert all(b.top >= 0 and b.top + b.height <= size[0] for b in boxes)
    assert all(b.left >= 0 and b.left + b.width <= size[1] for b in boxes)


def test_random_boxes_follow_the_law_of_torchvision():
    """Mean area and log-ratio agree with torchvision's algorithm, restated, within sampling error."""
    size, draws = (375, 500), np.random.default_rng(1)
    reference = []
    while len(reference) < 4000:
        area = size[0] * size[1] * draws.uniform(0.2, 1)
        aspect = np.exp(draws.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if w <= size[1] and h <= size[0]:
            reference.append((h * w, w / h))
    boxes = draw_boxes(size, 4000)
    ours = [(b.height * b.width, b.width / b.height) for b in boxes]
    for mine, theirs in zip(np.log(ours).T, np.log(reference).T, strict=True):
        assert abs(mine.mean() - theirs.mean()) < 4 * theirs.std() * np.sqrt(2 / 4000)


@pytest.mark.parametrize(("size", "expected"), [((10, 1000), (10, 13)), ((1000, 10), (13, 10))])
def test_a_picture_too_long_for_any_box_gives_its_center(size, expected):
    box = random_box(rng(0, "augment", 0), size, (224, 224), (0.9, 1.0), (3 / 4, 4 / 3))
    assert (box.height, box.width) == expected
    assert abs(box.top * 2 + box.height - size[0]) <= 1
    assert abs(box.left * 2 + box.width - size[1]) <= 1


def test_boxes_for_a_wide_target_are_wide():
    boxes = draw_boxes((400, 800), 200, target=(32, 64))
    ratios = [b.width / b.height for b in boxes]
    assert min(ratios) > 1.45
    assert max(ratios) < 2.75


def test_the_exact_view_has_the_bits_of_crop_then_pil_bicubic():
    pixels, config = noise(90, 120), settings(flip=False)
    box = random_box(rng(0, "augment", 7), (90, 120), (32, 32), config.data.crop_scale, config.data.crop_ratio)
    part = Image.fromarray(pixels[box.top:box.top + box.height, box.left:box.left + box.width])
    expected = np.asarray(part.resize((32, 32), Image.Resampling.BICUBIC))
    assert (view_of(pixels, 7, config) == expected).all()


def test_half_of_the_views_are_flipped():
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, :20] = 200
    views = [view_of(pixels, i, settings(augment="fixed")) for i in range(400)]
    flipped = np.mean([view[:, :8].mean() < view[:, -8:].mean() for view in views])
    assert 0.4 < flipped < 0.6


@pytest.mark.parametrize("size", [(90, 135), (135, 90), (20, 30)])
def test_the_evaluation_view_is_resize_then_center_crop(size):
    pixels = noise(*size)
    short = round(32 / 0.8)
    scaled = Image.fromarray(pixels).resize([round(side * short / min(size)) for side in size[::-1]],
                                            Image.Resampling.BICUBIC)
    left, top = (scaled.width - 32) // 2, (scaled.height - 32) // 2
    expected = np.asarray(scaled.crop((left, top, left + 32, top + 32))).astype(int)
    view, _ = transforms_crop.center(StoredImage(pixels), settings(), 0.8)
    assert np.abs(view - expected).max() <= 2  # sizes where torchvision rounds nothing


def test_fixed_crops_keep_the_scale_and_move():
    pixels = np.tile(np.arange(0, 240, 2, np.uint8)[None, :, None], (60, 1, 3))  # 120 wide, slope 2 per pixel
    config = settings(augment="fixed", flip=False)
    config.eval.crop_ratio = (0.8,)
    views = [view_of(pixels, i, config)[16, :, 0].astype(int) for i in range(50)]
    slopes = [(view[-2] - view[1]) / 29 for view in views]
    assert np.abs(np.array(slopes) - 2 * 48 / 32).max() < 0.1
    assert np.std([view[0] for view in views]) > 20


def test_augment_none_is_the_evaluation_view():
    pixels = noise(50, 70)
    view = view_of(pixels, 0, settings(augment="none"))
    assert (view == transforms_crop.center(StoredImage(pixels), settings(), 0.875)[0]).all()


@pytest.mark.parametrize("size", [(375, 500), (500, 375)])
def test_single_crops_follow_the_law_of_one_draw_cut_to_the_picture(size):
    """Heights and widths agree with the same law, restated on arrays, in mean and in how many are cut."""
    draws, count = np.random.default_rng(1), 8000
    area = size[0] * size[1] * draws.uniform(0.08, 1, count)
    aspect = np.exp(draws.uniform(np.log(3 / 4), np.log(4 / 3), count))
    reference = np.minimum(np.round([np.sqrt(area / aspect), np.sqrt(area * aspect)]).T, size)
    boxes = [transforms_crop.single_box(rng(0, "augment", i), size, (224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
             for i in range(count)]
    ours = np.array([(b.height, b.width) for b in boxes])
    assert (np.abs(ours.mean(0) - reference.mean(0)) < 4 * reference.std(0) * np.sqrt(2 / count)).all()
    cut = [(sizes == size).any(1).mean() for sizes in (ours, reference)]
    assert cut[0] > 0.1
    assert abs(cut[0] - cut[1]) < 0.03
    places = [b.top / (size[0] - b.height) for b in boxes if size[0] - b.height > 50]
    assert abs(np.mean(places) - 0.5) < 0.02
    assert min(places) < 0.02
    assert max(places) > 0.98


def test_a_single_crop_takes_one_draw_where_a_random_crop_draws_until_it_fits():
    """On a long image a crop of most of the area never fits: the one is cut, the other is the center."""
    limits = (40, 400), (224, 224), (0.9, 1.0), (3 / 4, 4 / 3)
    single = [transforms_crop.single_box(rng(0, "augment", i), *limits) for i in range(100)]
    random = [random_box(rng(0, "augment", i), *limits) for i in range(100)]
    assert {b.height for b in single} == {40}
    assert len({b.width for b in single}) > 20
    assert len(set(random)) == 1


@pytest.mark.parametrize("key", [key for key in GOLDEN if "/simple/" in key])
def test_simple_crops_are_those_of_torchvision(key):
    """Resize, RandomCrop(padding=4, padding_mode='reflect') at stated places; 1 level: we resize what is cut only."""
    name, _, place = key.split("/")
    side, top, left = map(int, place.split("-"))
    picture = StoredImage(GOLDEN[f"picture/{name}"])
    height, width = transforms_crop._covering_size((picture.height, picture.width), (side, side))
    down, right = (top + 0.5) / (height + 8 - side + 1), (left + 0.5) / (width + 8 - side + 1)
    view, _ = transforms_crop._simple_crop(picture, None, (side, side), down, right)
    assert np.abs(np.asarray(view).astype(int) - GOLDEN[key]).max() <= 1


@pytest.mark.parametrize(("size", "target", "covering"), [
    ((100, 151), (50, 50), (50, 75)), ((151, 100), (50, 50), (75, 50)), ((100, 100), (20, 60), (60, 60)),
    ((100, 400), (20, 60), (20, 80)), ((30, 90), (20, 60), (20, 60))])
def test_a_simple_crop_resizes_to_just_cover_the_target(size, target, covering):
    assert transforms_crop._covering_size(size, target) == covering


@pytest.mark.parametrize(("size", "target"), [(10, 8), (8, 8), (1, 8), (3, 1), (2, 16), (5, 5)])
def test_rows_beyond_the_edge_are_mirrored_as_numpy_does_and_places_are_uniform(size, target):
    padded = np.pad(np.arange(size), 4, mode="reflect")
    places = max(size + 8 - target + 1, 0)
    for first in range(places):
        expected = padded[first:first + target]
        for share in (first / places + 1e-9, (first + 1) / places - 1e-9):
            assert (transforms_crop._reflected(size, target, share) == expected).all()


@pytest.mark.parametrize("crop", ["none", "fixed", "simple", "single", "random"])
@pytest.mark.parametrize("target", [(32, 32), (24, 56)])
def test_a_mask_goes_through_the_geometry_of_its_picture(crop, target):
    """The mask says which of three grays a pixel had; it still does, but for blurred edges, and best where it lies."""
    mask = (noise(90, 120)[..., 0] // 86).astype(np.uint8)
    pixels = np.repeat((mask * 120)[..., None], 3, axis=2)
    config = settings(augment=crop, image_size=target)
    for position in range(20):
        view, moved = transforms_crop.augment(StoredImage(pixels), rng(0, "augment", position), config, 100 * mask)
        assert moved.dtype == np.uint8
        assert moved.shape == view.shape[:2]
        assert set(np.unique(moved) % 100) <= {0}  # picked, never mixed
        moved = moved // 100
        classes = np.round(view[..., 0] / 120)
        agree = np.mean(classes == moved)
        assert agree > 0.93
        assert all(agree > np.mean(classes == np.roll(moved, step, axis)) for axis in (0, 1) for step in (-1, 1))
        assert (view == view_of(pixels, position, config)).all()


def test_the_evaluations_mask_is_cut_as_its_picture():
    mask = (noise(90, 120)[..., 0] // 86).astype(np.uint8)
    pixels = np.repeat((mask * 120)[..., None], 3, axis=2)
    view, moved = transforms_crop.center(StoredImage(pixels), settings(), 0.8, mask)
    assert np.mean(np.round(view[..., 0] / 120) == moved) > 0.95
    assert transforms_crop.center(StoredImage(pixels), settings(), 0.8)[1] is None


def test_a_mask_of_another_size_is_a_bad_picture():
    with pytest.raises(BadImage, match=r"mask .*\(9, 8\), .*\(8, 9\)"):
        transforms_crop.augment(StoredImage(noise(8, 9)), rng(0, "augment", 0), settings(), np.zeros((9, 8), np.uint8))


@pytest.mark.parametrize("crop", ["none", "fixed", "simple", "single", "random"])
@pytest.mark.parametrize("color", ["none", "jitter", "three", "rand"])
def test_every_augmentation_gives_the_target_size_from_any_picture(crop, color):
    config = settings(augment=crop, color=color, image_size=(16, 48))
    for size in ((1, 1), (3, 200), (200, 3), (40, 40)):
        view = view_of(noise(*size), 3, config)
        assert view.shape == (16, 48, 3)
        assert view.dtype == np.uint8


@pytest.mark.parametrize("crop", ["fixed", "simple", "single", "random"])
@pytest.mark.parametrize("color", ["none", "jitter", "three", "rand"])
def test_an_address_gives_the_same_bits_again_and_another_gives_others(crop, color):
    config, pixels = settings(augment=crop, color=color), noise(60, 80)
    views = [view_of(pixels, position, config) for position in (5, 5, 6)]
    assert (views[0] == views[1]).all()
    assert (views[0] != views[2]).any()
