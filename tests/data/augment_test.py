import numpy as np
import pytest
from PIL import Image

from mae_jax.config import default
from mae_jax.data import augment
from mae_jax.data.decode import Picture
from mae_jax.data.random import rng


def settings(**fields):
    config = default()
    config.data.update({"image_size": (32, 32), **fields})
    return config


def noise(height, width):
    """Noise with coarse structure."""
    coarse = np.random.default_rng(0).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def draw_boxes(size, count, target=(224, 224)):
    return [augment.random_box(rng(0, "augment", i), size, target, (0.2, 1.0), (3 / 4, 4 / 3)) for i in range(count)]


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
def test_a_picture_too_long_for_any_box_gives_its_centre(size, expected):
    box = augment.random_box(rng(0, "augment", 0), size, (224, 224), (0.9, 1.0), (3 / 4, 4 / 3))
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
    box = augment.random_box(rng(0, "augment", 7), (90, 120), (32, 32), config.data.crop_scale, config.data.crop_ratio)
    part = Image.fromarray(pixels[box.top:box.top + box.height, box.left:box.left + box.width])
    expected = np.asarray(part.resize((32, 32), Image.Resampling.BICUBIC))
    assert (augment.augment(Picture(pixels), rng(0, "augment", 7), config) == expected).all()


def test_half_of_the_views_are_flipped():
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, :20] = 200
    views = [augment.augment(Picture(pixels), rng(0, "augment", i), settings(augment="fixed")) for i in range(400)]
    flipped = np.mean([view[:, :8].mean() < view[:, -8:].mean() for view in views])
    assert 0.4 < flipped < 0.6


@pytest.mark.parametrize("size", [(90, 135), (135, 90), (20, 30)])
def test_the_evaluation_view_is_resize_then_centre_crop(size):
    pixels = noise(*size)
    short = round(32 / 0.8)
    scaled = Image.fromarray(pixels).resize([round(side * short / min(size)) for side in size[::-1]],
                                            Image.Resampling.BICUBIC)
    left, top = (scaled.width - 32) // 2, (scaled.height - 32) // 2
    expected = np.asarray(scaled.crop((left, top, left + 32, top + 32))).astype(int)
    view = augment.centre(Picture(pixels), settings(), 0.8)
    assert np.abs(view - expected).max() <= 2  # sizes where torchvision rounds nothing


def test_fixed_crops_keep_the_scale_and_move():
    pixels = np.tile(np.arange(0, 240, 2, np.uint8)[None, :, None], (60, 1, 3))  # 120 wide, slope 2 per pixel
    config = settings(augment="fixed", flip=False)
    config.eval.crop_ratio = (0.8,)
    views = [augment.augment(Picture(pixels), rng(0, "augment", i), config)[16, :, 0].astype(int) for i in range(50)]
    slopes = [(view[-2] - view[1]) / 29 for view in views]
    assert np.abs(np.array(slopes) - 2 * 48 / 32).max() < 0.1
    assert np.std([view[0] for view in views]) > 20


def test_augment_none_is_the_evaluation_view():
    picture = Picture(noise(50, 70))
    view = augment.augment(picture, rng(0, "augment", 0), settings(augment="none"))
    assert (view == augment.centre(picture, settings(), 0.875)).all()


def test_jitter_changes_colours_within_its_strengths():
    image = Image.new("RGB", (4, 4), (100, 120, 140))
    views = np.array([np.asarray(augment.jitter(image, rng(0, "augment", i)))[0, 0] for i in range(300)])
    means = views.mean(1)
    assert 120 * 0.5 < means.min() < 85
    assert 155 < means.max() < 120 * 1.5
    assert np.ptp(views, axis=1).std() > 5  # saturation too


def test_a_whole_turn_of_the_hue_changes_nothing_and_a_third_swaps_the_primaries():
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    green = np.asarray(augment._shift_hue(red, 1 / 3))[0, 0]
    assert green.argmax() == 1
    assert green[1] > 250


@pytest.mark.parametrize("crop", ["none", "fixed", "random"])
@pytest.mark.parametrize("colour", ["none", "jitter"])
def test_every_augmentation_gives_the_target_size_from_any_picture(crop, colour):
    config = settings(augment=crop, colour=colour, image_size=(16, 48))
    for size in ((1, 1), (3, 200), (40, 40)):
        view = augment.augment(Picture(noise(*size)), rng(0, "augment", 3), config)
        assert view.shape == (16, 48, 3)
        assert view.dtype == np.uint8
