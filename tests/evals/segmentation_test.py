"""Confusions and figures of pixels, against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from mae_jax.evals import accumulators, segmentation


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
    found = segmentation.confusion(logits, mask, valid)
    assert found.dtype == jnp.int32
    truth, predicted = mask[valid > 0].ravel(), logits[valid > 0].argmax(-1).ravel()
    wanted = metrics.confusion_matrix(truth[truth < 255], predicted[truth < 255], labels=np.arange(6))
    np.testing.assert_array_equal(found, wanted)


def test_the_confusion_does_not_depend_on_how_pictures_are_batched():
    logits, mask = scene()
    count = jax.jit(segmentation.confusion)
    total = {}
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        total = accumulators.add(total, {"confusion": count(logits[rows], mask[rows], np.ones(len(mask[rows])))})
    np.testing.assert_array_equal(total["confusion"], count(logits, mask, np.ones(5)))


def test_sums_of_pixels_pass_the_reach_of_int32():
    part = {"confusion": np.full((2, 2), 2**31 - 1, np.int32)}
    total = accumulators.add(accumulators.add({}, part), part)
    assert segmentation.summary(total["confusion"]) == {"miou": pytest.approx(1 / 3), "pixel_accuracy": 0.5}


def test_figures_are_scikit_learns_over_the_classes_in_truth_or_prediction():
    logits, mask = scene()
    matrix = np.asarray(segmentation.confusion(logits, mask, np.ones(5)))
    keep = mask < 255
    truth, predicted = mask[keep], logits.argmax(-1)[keep]
    occurs = np.union1d(truth, predicted)
    assert list(occurs) == [0, 1, 2, 3, 4]
    each = metrics.jaccard_score(truth, predicted, labels=occurs, average=None)
    np.testing.assert_allclose(segmentation.iou(matrix), [*each, np.nan])
    assert segmentation.summary(matrix) == {"miou": pytest.approx(each.mean()),
                                            "pixel_accuracy": pytest.approx(metrics.accuracy_score(truth, predicted))}


def test_figures_of_nothing_are_nan():
    assert np.isnan(list(segmentation.summary(np.zeros((3, 3), np.int64)).values())).all()
