"""Which anchors are sampled where they may not cross the border of an image."""

import jax
import numpy as np
import pytest

from mae_jax.ops.detection.anchors import anchors
from mae_jax.ops.detection.assignment import NEGATIVE, NEITHER, POSITIVE
from mae_jax.ops.detection.selection import Objects, sampled_anchors

ANCHORS = anchors((64, 64), (8,), (16,), (1.0,))[0]  # 8 x 8 cells, the image in the upper left of the canvas
SIZE = np.array([40, 56], np.int32)


@pytest.fixture(scope="module", name="sample")
def fixture_sample():
    def sampled(border, box):
        objects = Objects(np.array([box], np.float32), np.zeros(1, np.int32), np.ones(1, bool))
        found, _ = sampled_anchors(jax.random.key(0), objects, np.True_, SIZE, ANCHORS, (0.7, 0.3), 0.0, len(ANCHORS),
                                   len(ANCHORS), border)
        return found
    return sampled


@pytest.mark.parametrize("border", [0, 4, 8])
def test_anchors_beyond_the_border_are_neither_positive_nor_negative(border, sample):
    found = sample(border, (16, 8, 32, 24))
    used = set(np.asarray(found.index)[np.asarray(found.kind) != NEITHER].tolist())
    height, width = SIZE
    assert used == {number for number, (left, top, right, bottom) in enumerate(ANCHORS.tolist())
                    if left >= -border and top >= -border and right < width + border and bottom < height + border
                    and not 0.3 <= overlap((left, top, right, bottom), (16, 8, 32, 24)) < 0.7}


def test_without_a_limit_all_anchors_are_used(sample):
    found = sample(-1, (50, 50, 62, 62))
    assert np.isin(np.asarray(found.kind), (POSITIVE, NEGATIVE)).sum() == sum(
        not 0.3 <= overlap(box, (50, 50, 62, 62)) < 0.56 for box in ANCHORS.tolist())


def test_an_object_at_the_border_takes_the_best_anchor_inside(sample):
    """The best of all anchors is at (0, 0), with half of it outside."""
    box = (0, 0, 10, 10)
    inside = sample(0, box)
    [best] = np.asarray(inside.index)[np.asarray(inside.kind) == POSITIVE]
    np.testing.assert_array_equal(ANCHORS[best], (0, 0, 16, 16))
    anywhere = sample(-1, box)
    assert {tuple(ANCHORS[i]) for i in np.asarray(anywhere.index)[np.asarray(anywhere.kind) == POSITIVE]} == {
        (0, 0, 16, 16)}


def overlap(a, b):
    """Returns the IoU of two boxes."""
    width, height = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (areas - width * height)
