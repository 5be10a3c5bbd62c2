"""Before a run it is said if no anchor fits the objects: such a detector would train, and find little."""

import re

import numpy as np
import pytest

from mae_jax.data import object_sizes
from mae_jax.data.objects import Annotations, Objects, Truth
from mae_jax.data.sources.base import Source
from tests.helpers.tiny import tiny_config


def split(side, crowd=()):
    """Returns a split of three images of 200 x 400 pixels, each with an object `side` pixels wide and high."""
    box = np.array([(10, 10, 10 + side, 10 + side), *crowd], np.float32)
    n = len(box)
    objects = Objects((200, 400), box, np.zeros(n, np.int32), np.arange(n) > 0, np.ones(n, np.float32), ())
    return Source(3, None, str, ("thing",), annotations=Annotations(lambda i: Truth(i, objects), (1,)))


def config(**changed):
    return tiny_config({"data.source": "coco", "data.image_size": (64, 64), "method.anchor_sizes": (16.0, 32.0),
                        "method.scales": (1.0, 0.5), **changed}, "detection")


@pytest.mark.parametrize(("side", "says"), [
    (100, ""),  # as large as an anchor on the canvas, where the image is 32 x 64
    (30, r"100 % of the objects of data.train_split='train' overlap no anchor by 0.3.*a canvas of 64 x 64 pixels they "
         r"are 5 to 5 pixels large \(the middle 5\).*anchor_sizes='\(3.4,6.8\)'"),
    (380, "are 61 to 61 pixels large")])
def test_anchors_that_fit_no_object_are_told_with_sizes_that_do(side, says, caplog):
    object_sizes.warn(split(side), config())
    assert len(caplog.records) == bool(says)
    assert re.search(says, caplog.text)


def test_crowds_and_empty_boxes_have_no_size(caplog):
    object_sizes.warn(split(100, crowd=[(0, 0, 4, 4), (0, 0, 5, 5)]), config())
    object_sizes.warn(split(0), config())
    assert not caplog.records


def test_the_best_overlap_is_of_shapes_alone():
    overlaps = object_sizes.best_overlaps(np.array([(16, 16), (32, 8), (8, 8)], np.float32), (16.0,), (0.25, 1.0))
    np.testing.assert_allclose(overlaps, [1, 1, 0.25], rtol=1e-6)
