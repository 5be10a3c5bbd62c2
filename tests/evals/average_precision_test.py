"""COCO's average precision: beside pycocotools' values, by hand, and whatever is installed."""

from pathlib import Path

import numpy as np
import pytest

from mae_jax.evals import average_precision
from mae_jax.evals.average_precision import FIGURES, Found, of_numpy, of_pycocotools
from tests.helpers.detected import ellipse, scenes, unflat

GOLDEN = Path("tests/golden/average_precision.npz")


def truth_of(*boxes, label=None, area=None, crowd=None):
    box = np.array(boxes, np.float64).reshape(-1, 4)
    size = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    return Found(box, np.zeros(len(box), int) if label is None else np.array(label), tuple(map(ellipse, box)), None,
                 size if area is None else np.array(area), np.zeros(len(box), bool) if crowd is None else
                 np.array(crowd))


def found_of(*boxes, score=None, label=None):
    box = np.array(boxes, np.float64).reshape(-1, 4)
    return Found(box, np.zeros(len(box), int) if label is None else np.array(label), tuple(map(ellipse, box)),
                 np.linspace(0.9, 0.5, len(box)) if score is None else np.array(score))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_figures_are_those_of_pycocotools(seed, kind):
    with np.load(GOLDEN) as stored:
        arrays = {name.split("/")[1]: stored[name] for name in stored.files if name.startswith(f"{seed}/")}
    figures = of_numpy(*unflat(arrays), masks=kind == "mask")
    np.testing.assert_allclose([figures[name] for name in FIGURES], arrays[kind], rtol=0, atol=1e-12)
    assert 0.1 < figures["ap"] < figures["ap50"] < 0.9


@pytest.mark.parametrize("masks", [False, True])
def test_figures_are_those_of_the_library(masks):
    truth, found = scenes(seed=7)
    ours, theirs = of_numpy(truth, found, masks), of_pycocotools(truth, found, masks)
    np.testing.assert_allclose([theirs[key] for key in FIGURES], [ours[key] for key in FIGURES], rtol=0, atol=1e-12)


@pytest.mark.parametrize("masks", [False, True])
def test_perfect_detections_have_one_and_none_have_nothing(masks):
    truth, _ = scenes(images=8, seed=3)
    alone = [each._replace(crowd=np.zeros_like(each.crowd)) for each in truth]
    perfect = [Found(each.box, each.label, each.masks, np.ones(len(each.label))) for each in alone]
    nothing = [found_of() for _ in truth]
    for judge in (of_numpy, average_precision.figures):
        ones = [value for value in judge(alone, perfect, masks).values() if not np.isnan(value)]
        assert ones == pytest.approx([1] * len(ones), abs=1e-12)  # pycocotools divides by a little more than there is
        assert all(value == 0 for value in judge(alone, nothing, masks).values() if not np.isnan(value))


@pytest.mark.parametrize(("shift", "steps"), [(0, 10), (1, 7), (2, 4), (3, 1), (4, 0)])
def test_a_known_overlap_has_the_known_step(shift, steps):
    """A square of 10 moved by s overlaps by (10 - s) / (10 + s): 1, .82, .67, .54, .43."""
    truth, found = truth_of([20, 20, 30, 30]), found_of([20 + shift, 20, 30 + shift, 30])
    figures = of_numpy([truth], [found], masks=False)
    assert figures["ap"] == pytest.approx(steps / 10)
    assert (figures["ap50"], figures["ap75"]) == (float(steps > 0), float(steps > 5))
    assert figures["ap_small"] == figures["ap"]
    assert np.isnan([figures["ap_medium"], figures["ap_large"]]).all()


def test_a_wrong_detection_before_the_right_one_halves_the_precision():
    truth = truth_of([20, 20, 30, 30])
    right, wrong = [20, 20, 30, 30], [60, 60, 80, 80]
    assert of_numpy([truth], [found_of(right, wrong)], False)["ap"] == 1
    assert of_numpy([truth], [found_of(wrong, right)], False)["ap"] == pytest.approx(0.5)
    assert of_numpy([truth], [found_of(wrong, right, label=[1, 0])], False)["ap"] == 1  # no object is of class 1


def test_what_lies_in_a_crowd_is_no_mistake():
    truth = truth_of([0, 0, 60, 60], [100, 100, 120, 120], crowd=[True, False])
    inside = [5, 5, 20, 20], [30, 30, 50, 50], [100, 100, 120, 120]
    assert of_numpy([truth], [found_of(*inside)], False)["ap"] == 1
    outside = [65, 65, 90, 90], [100, 100, 120, 120]
    assert of_numpy([truth], [found_of(*outside)], False)["ap"] == pytest.approx(0.5)


def test_the_area_that_was_annotated_says_how_large_an_object_is():
    figures = of_numpy([truth_of([0, 0, 50, 50], area=[900.0])], [found_of([0, 0, 50, 50])], False)
    assert figures["ap_small"] == 1  # though its box has 2,500
    assert np.isnan(figures["ap_medium"])
