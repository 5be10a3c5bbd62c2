"""Upsampling against scipy and scikit-image, confusions against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import skimage.transform
from sklearn import metrics

from mae_jax.evals import classify, segment
from mae_jax.ops.patches import assemble


@pytest.mark.parametrize(("grid", "patch"), [((3, 5), (4, 4)), ((14, 14), (16, 16)), ((2, 3), (7, 2)),
                                               ((1, 4), (3, 1))])
def test_upsampling_is_bilinear_about_pixel_centres_with_the_edge_repeated(grid, patch):
    logits = np.random.default_rng(0).normal(size=(2, *grid, 3)).astype(np.float32)
    found = segment.upsample(logits, patch)
    size = grid[0] * patch[0], grid[1] * patch[1]
    assert found.shape == (2, *size, 3)
    centres = np.meshgrid(*((np.arange(n) + 0.5) / p - 0.5 for n, p in zip(size, patch, strict=True)), indexing="ij")
    for picture, wanted in zip(np.asarray(found), logits, strict=True):
        for channel in range(3):
            peer = scipy.ndimage.map_coordinates(wanted[..., channel], centres, order=1, mode="nearest")
            np.testing.assert_allclose(picture[..., channel], peer, atol=1e-5)
        peer = skimage.transform.resize(wanted, size, order=1, mode="edge", anti_aliasing=False)
        np.testing.assert_allclose(picture, peer, atol=1e-5)


def test_upsampling_keeps_float32_whatever_the_logits_are():
    logits = jnp.arange(8, dtype=jnp.bfloat16).reshape(1, 2, 2, 2)
    assert segment.upsample(logits, (4, 4)).dtype == jnp.float32


def test_pixels_are_cut_as_pictures_are():
    patches = np.random.default_rng(0).integers(256, size=(2, 6, 4 * 3 * 3), dtype=np.uint8)
    pictures = assemble(patches, np.tile(np.arange(6), (2, 1)), (2, 3), (4, 3))
    np.testing.assert_array_equal(segment.pixels_in_patch_order(pictures, (4, 3)), patches.reshape(2, 6, 12, 3))


def scene(seed: int = 0, batch: int = 5, pixels: int = 40, classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits [batch, pixels, classes] and masks; the last two classes never occur, the last is never found."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(classes - 2, size=(batch, pixels)).astype(np.uint8)
    logits = rng.normal(size=(batch, pixels, classes)) + 1.5 * np.eye(classes)[mask]
    logits[..., -1] = -99
    mask[rng.random(mask.shape) < 0.1] = 255
    return logits.astype(np.float32), mask


def test_the_confusion_is_scikit_learns_without_ignored_pixels_and_padding():
    logits, mask = scene()
    valid = np.array([1, 1, 0, 1, 0], np.float32)
    found = segment.confusion(logits, mask, valid)
    assert found.dtype == jnp.int32
    truth, predicted = mask[valid > 0].ravel(), logits[valid > 0].argmax(-1).ravel()
    wanted = metrics.confusion_matrix(truth[truth < 255], predicted[truth < 255], labels=np.arange(6))
    np.testing.assert_array_equal(found, wanted)


def test_the_confusion_does_not_depend_on_how_pictures_are_batched():
    logits, mask = scene()
    count = jax.jit(segment.confusion)
    total = {}
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        total = classify.add(total, {"confusion": count(logits[rows], mask[rows], np.ones(len(mask[rows])))})
    np.testing.assert_array_equal(total["confusion"], count(logits, mask, np.ones(5)))


def test_sums_of_pixels_pass_the_reach_of_int32():
    part = {"confusion": np.full((2, 2), 2**31 - 1, np.int32)}
    total = classify.add(classify.add({}, part), part)
    assert segment.summary(total["confusion"]) == {"miou": pytest.approx(1 / 3), "pixel_accuracy": 0.5}


def test_figures_are_scikit_learns_over_the_classes_in_truth_or_prediction():
    logits, mask = scene()
    matrix = np.asarray(segment.confusion(logits, mask, np.ones(5)))
    keep = mask < 255
    truth, predicted = mask[keep], logits.argmax(-1)[keep]
    occurs = np.union1d(truth, predicted)
    assert list(occurs) == [0, 1, 2, 3, 4]
    each = metrics.jaccard_score(truth, predicted, labels=occurs, average=None)
    np.testing.assert_allclose(segment.iou(matrix), [*each, np.nan])
    assert segment.summary(matrix) == {"miou": pytest.approx(each.mean()),
                                       "pixel_accuracy": pytest.approx(metrics.accuracy_score(truth, predicted))}


def test_figures_of_nothing_are_nan():
    assert np.isnan(list(segment.summary(np.zeros((3, 3), np.int64)).values())).all()


def test_logits_of_patches_meet_their_masks_in_patch_order():
    truth = np.random.default_rng(0).integers(4, size=(2, 2, 3)).repeat(8, 1).repeat(8, 2)  # one class in a patch
    centres = np.eye(4, dtype=np.float32)[truth[:, 4::8, 4::8]]
    pixels = segment.pixels_in_patch_order(segment.upsample(centres, (8, 8)), (8, 8))
    mask = segment.pixels_in_patch_order(truth[..., None], (8, 8))[..., 0]
    matrix = np.asarray(segment.confusion(pixels.reshape(2, -1, 4), mask.reshape(2, -1), np.ones(2)))
    # Next to other classes at most a corner is lost: bilinear weights of a patch are the largest inside of it.
    assert segment.summary(matrix)["pixel_accuracy"] > 0.95
    assert matrix.sum() == truth.size


def attention() -> tuple[np.ndarray, np.ndarray]:
    """Returns maps in 0..1 that are higher in the foreground, and the masks."""
    rng = np.random.default_rng(0)
    masks = rng.random((7, 6, 5)) < 0.4
    return np.clip(0.3 * masks + 0.3 + 0.2 * rng.normal(size=masks.shape), 0, 1), masks


def test_the_foreground_is_scored_picture_by_picture():
    maps, masks = attention()
    each = [metrics.jaccard_score(mask.ravel(), (found >= 0.45).ravel())
            for found, mask in zip(maps, masks, strict=True)]
    assert segment.foreground_iou(maps, masks, 0.45) == pytest.approx(np.mean(each))


def test_a_picture_with_nothing_to_find_and_nothing_found_is_right():
    maps, masks = np.zeros((2, 3, 3)), np.zeros((2, 3, 3), bool)
    masks[1, 0, 0] = True
    assert segment.foreground_iou(maps, masks, 0.5) == 0.5


def test_the_best_threshold_is_the_one_of_the_highest_score():
    maps, masks = attention()
    candidates = np.linspace(0, 1, 21)
    best = segment.best_threshold(maps, masks, candidates)
    assert 0.3 < best < 0.6
    assert segment.foreground_iou(maps, masks, best) == max(segment.foreground_iou(maps, masks, t) for t in candidates)
