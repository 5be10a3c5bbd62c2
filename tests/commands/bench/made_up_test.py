"""Batches of random numbers: fields that a method can use, so that a timed step does what a step of training does."""

import jax
import numpy as np

from mae_jax.commands.bench import made_up
from tests.helpers.tiny import tiny_config, tiny_method


def spec(method):
    return method.eval_spec()


def test_objects_lie_in_images_that_fill_their_canvas():
    method = tiny_method(tiny_config({"data.max_objects": 9}, "detection"))
    made = made_up.batch(method, spec(method))
    assert {name: (value.shape, value.dtype) for name, value in made.items()} == {
        name: (s.shape, s.dtype) for name, s in spec(method).items()}
    assert (made["size"] == method.config.data.image_size).all()
    np.testing.assert_array_equal(made["box_valid"].sum(1), made_up.OBJECTS)
    boxes = made["box"][made["box_valid"] > 0]
    limit = np.tile(np.array(method.config.data.image_size)[::-1], 2)
    assert ((boxes >= 0) & (boxes <= limit)).all()
    sides = (boxes[:, 2:] - boxes[:, :2]) / limit[:2]
    assert ((sides >= made_up.SIDES[0] - 1e-6) & (sides <= made_up.SIDES[1] + 1e-6)).all()
    assert made["box_class"].max() < method.classes


def test_an_order_is_a_permutation_and_every_image_is_valid():
    method = tiny_method(tiny_config())
    made = made_up.batch(method, {"order": jax.ShapeDtypeStruct((3, 16), np.int32), **spec(method)})
    np.testing.assert_array_equal(np.sort(made["order"], 1)[0], np.arange(made["order"].shape[1]))
    assert (made["valid"] == 1).all()
