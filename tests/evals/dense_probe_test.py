"""Scores of dense predictions against scikit-learn, and images of them."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from mae_jax.evals import segmentation
from mae_jax.evals.evaluator import Evaluator
from mae_jax.evals.image_grid import CAPTION, GAP
from mae_jax.losses.segmentation import IGNORED
from mae_jax.runtime import sharding
from tests.helpers.tiny import tiny_method, tiny_segment, tiny_segment_batch, tiny_state


def test_figures_are_those_of_all_pixels_of_all_batches_together():
    config = tiny_segment()
    method, state = tiny_method(config), tiny_state(config)
    batches = [tiny_segment_batch(config, seed) for seed in range(2)]
    batches[1]["valid"][5:] = 0
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    inputs = SimpleNamespace(classes=(), evaluate=lambda: iter(batches), validate=lambda: iter(()))
    found = Evaluator(method, inputs, mesh).scalars(state)
    assert found.keys() == {"eval/loss", "eval/miou", "eval/pixel_accuracy"}
    truth = np.concatenate([np.asarray(method.pixel_classes(batch)) for batch in batches])
    logits = np.concatenate([np.asarray(method.pixel_logits(state.params, {}, batch)) for batch in batches])
    known = truth != IGNORED
    truth, predicted = truth[known], logits.argmax(-1)[known]
    assert found["eval/miou"] == pytest.approx(jaccard_score(truth, predicted, average="macro"), abs=1e-6)
    assert found["eval/pixel_accuracy"] == pytest.approx((truth == predicted).mean(), abs=1e-6)
    assert found["eval/loss"] > 0


def test_pictures_show_input_truth_and_prediction():
    config = tiny_segment()
    method, state, batch = tiny_method(config), tiny_state(config), tiny_segment_batch(config)
    batch["pixel_label"][0] = 1
    picture = segmentation.pictures(method, state.params, {}, batch)
    keys = CAPTION + GAP  # three classes take one line
    assert picture.shape == (2 * CAPTION + 4 * (128 + GAP) + GAP + keys, 6 * (128 + GAP) + GAP, 3)
    assert (picture[-keys + 6, GAP + 5 + segmentation.KEY] == segmentation.palette(3)[1]).all()
    truth = picture[2 * CAPTION : 2 * CAPTION + 128, 128 + 2 * GAP : 2 * (128 + GAP)]
    assert (truth == segmentation.palette(3)[1]).all()


def test_each_class_has_a_color_of_its_own_and_what_counts_nowhere_another():
    colors = segmentation.palette(150)
    assert len(np.unique(colors[:151], axis=0)) == 151
    assert (colors[0] == 0).all()
    np.testing.assert_array_equal(colors[1], (128, 0, 0))
    assert (colors[IGNORED] == segmentation.CREAM).all()
