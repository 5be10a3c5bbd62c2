"""Crops of images at random scales, their masks, and what is laid around them; colors of photographs distorted."""

import colorsys

import numpy as np
import pytest
from PIL import Image

from mae_jax.config import default
from mae_jax.data.decode import StoredImage
from mae_jax.data.transforms import color, crop, scaled_crop
from mae_jax.ops.patches import normalize
from mae_jax.rng import rng

COLORS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)  # of classes


def settings(**fields):
    config = default("segment")
    config.data.update({"image_size": (32, 48), "augment": "scaled", **fields})
    return config


def scene(height, width, seed=0):
    """Returns pixels of three colors in blocks, and the mask of these."""
    blocks = np.random.default_rng(seed).integers(3, size=(-(-height // 16), -(-width // 16)))
    mask = blocks.repeat(16, 0).repeat(16, 1)[:height, :width].astype(np.uint8)
    return COLORS[mask], mask


def views(pixels, mask, config, count):
    return [crop.augment(StoredImage(pixels), rng(0, "augment", n), config, mask) for n in range(count)]


def test_a_crop_is_a_function_of_its_position_and_mask_and_image_move_together():
    pixels, mask = scene(60, 90)
    config = settings()
    found = views(pixels, mask, config, 30)
    for (image, classes), (same, also) in zip(found, views(pixels, mask, config, 30), strict=True):
        assert image.shape == (32, 48, 3)
        assert classes.shape == (32, 48)
        np.testing.assert_array_equal(image, same)
        np.testing.assert_array_equal(classes, also)
        inside = classes < 255
        nearest = np.abs(image[..., None, :].astype(int) - COLORS).sum(-1).argmin(-1)
        assert (nearest == classes)[inside].mean() > 0.93  # the rest lies at the edges of blocks
        np.testing.assert_array_equal(image[~inside], np.broadcast_to(scaled_crop.FILL, image[~inside].shape))
    assert len({image.tobytes() for image, _ in found}) == 30


@pytest.mark.parametrize(("size", "short", "resized"), [
    ((683, 1024), 512, (512, 768)), ((1024, 683), 256, (384, 256)), ((100, 1000), 512, (205, 2048)),
    ((512, 512), 1024, (1024, 1024))])
def test_an_image_keeps_its_ratio_and_its_long_side_is_at_most_four_short_ones(size, short, resized):
    assert scaled_crop.scaled_size(size, short) == resized


def test_scales_are_uniform_over_their_range_and_what_is_missing_lies_below_and_to_the_right():
    pixels, mask = scene(64, 64)
    found = views(pixels, mask, settings(image_size=(64, 64), scales=(0.5, 1.0)), 200)
    sides = []
    for _, classes in found:
        rows, columns = (classes < 255).any(1), (classes < 255).any(0)
        assert rows[:rows.sum()].all()
        assert columns[:columns.sum()].all()
        sides.append(rows.sum())
    assert (min(sides), max(sides)) in [(32, 64), (32, 63), (33, 64), (33, 63)]
    assert abs(np.mean(sides) - 48) < 3 * np.std(sides) / np.sqrt(200)


def test_what_is_laid_around_an_image_is_nothing_once_normalized():
    assert np.abs(normalize(np.array(scaled_crop.FILL * 4, np.uint8))).max() < 0.01


def test_a_crop_of_one_class_is_drawn_again_but_not_for_ever():
    mask = np.zeros((32, 320), np.uint8)
    mask[:, :80] = 1
    config = settings(image_size=(32, 32), scales=(1.0, 1.0), flip=False)
    found = [classes for _, classes in views(COLORS[mask], mask, config, 200)]
    resized = (np.arange(128) < 32).astype(np.uint8)[None]  # the image is four times as wide as a crop
    chance = np.mean([scaled_crop.is_varied(resized[:, left:left + 32]) for left in range(97)])  # of one draw
    varied = np.mean([scaled_crop.is_varied(classes) for classes in found])
    assert chance < 0.2
    assert abs(varied - (1 - (1 - chance) ** 11)) < 0.1  # four deviations of 200 crops
    alone = views(COLORS[mask * 0], mask * 0, config, 3)
    assert all(set(np.unique(classes)) == {0, 255} for _, classes in alone)


@pytest.mark.parametrize(("mask", "varied"), [
    ([0, 0, 0, 1], False), ([0, 0, 1, 1], True), ([0, 0, 255, 255], False), ([255] * 4, False), ([0, 0, 1, 255], True),
    ([0, 0, 0, 1, 2], True)])
def test_the_largest_class_of_a_crop_has_less_than_three_quarters_of_the_labelled_pixels(mask, varied):
    assert scaled_crop.is_varied(np.array([mask], np.uint8)) == varied


class Draws:
    """A generator whose draws are given: which changes are made, contrast early or late, and how much."""

    def __init__(self, on, shift=0.0, factors=(1.0, 1.0), turn=0):
        self.on, self.amounts, self.turn = on, [shift, np.array(factors)], turn

    def random(self, count):
        assert count == 5
        return np.where(self.on, 0.1, 0.9)

    def uniform(self, low, high, count=None):
        return self.amounts.pop(0)

    def integers(self, low, high):
        assert (low, high) == (-18, 18)
        return self.turn


def distorted(pixels, *draws, **more):
    return np.asarray(color.distort(Image.fromarray(pixels), Draws(*draws, **more)))


def test_brightness_and_contrast_are_sums_and_products_cut_to_bytes():
    pixels = np.random.default_rng(0).integers(256, size=(9, 8, 3)).astype(np.uint8)
    np.testing.assert_array_equal(distorted(pixels, [0] * 5), pixels)
    np.testing.assert_array_equal(distorted(pixels, [1, 0, 0, 0, 0], -20.5),
                                  (pixels - 20.5).clip(0, 255).astype(np.uint8))
    for early in (0, 1):
        wanted = ((pixels + 30.0).clip(0, 255).astype(np.uint8) * 1.5).clip(0, 255).astype(np.uint8)
        np.testing.assert_array_equal(distorted(pixels, [1, 1, early, 0, 0], 30.0, (1.5, 1.0)), wanted)


def test_saturation_and_hue_are_those_of_hsv_and_late_contrast_follows_them():
    pixels = np.array([[[200, 40, 40], [60, 90, 180], [120, 120, 120]]], np.uint8)
    def hsv(found):
        return np.array([colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in found.reshape(-1, 3)])
    before, after = hsv(pixels), hsv(distorted(pixels, [0, 0, 0, 1, 1], factors=(1.0, 0.5), turn=18))
    np.testing.assert_allclose(after[:, 1], before[:, 1] * 0.5, atol=0.02)
    np.testing.assert_allclose(after[:2, 0], (before[:2, 0] + 0.1) % 1, atol=0.02)
    np.testing.assert_allclose(after[:, 2], before[:, 2], atol=0.01)
    late = distorted(pixels, [0, 1, 0, 1, 1], factors=(0.5, 0.5), turn=18)
    wanted = distorted(pixels, [0, 0, 0, 1, 1], factors=(1.0, 0.5), turn=18)
    np.testing.assert_array_equal(late, (wanted * 0.5).astype(np.uint8))


def test_each_change_is_made_half_the_time_and_repeats_at_its_address():
    pixels, _ = scene(16, 16)
    image = Image.fromarray(pixels)
    found = [np.asarray(color.distort(image, rng(0, "augment", n))) for n in range(400)]
    same = np.mean([np.array_equal(each, pixels) for each in found])
    assert abs(same - 1 / 16) < 0.05
    np.testing.assert_array_equal(found[3], color.distort(image, rng(0, "augment", 3)))
