"""A few steps of every method of the table; what each computes is in the test of its own name."""

from typing import Any

import jax
import numpy as np
import pytest

from mae_jax import methods
from mae_jax.param_tree import flatten
from tests.helpers.scenes import scene_batch
from tests.helpers.tiers import all_slow_but
from tests.helpers.tiny import (
    OWN,
    raster_batch,
    tiny_batch,
    tiny_config,
    tiny_method,
    tiny_params,
    tiny_segment_batch,
    tiny_state,
    tiny_step,
)

STEPS = 5
# Batches of the others are tiny_batch.
MAKE = {"detection": scene_batch, "segment": tiny_segment_batch, "supervised": raster_batch}


def extras(method: str, config: Any) -> dict[str, Any]:
    """Returns what a method has besides parameters before the first step, by NumPy."""
    draws = np.random.default_rng(2)
    if method == "dino":
        return {"teacher": tiny_params(config, 1), "center": np.zeros(config.method.out_dim, np.float32)}
    if method == "moce":
        return {"centroids": draws.normal(size=(4, 32)).astype(np.float32), "share": np.full(4, 0.25, np.float32)}
    if method in ("beit", "splitmask"):
        return {"vocabulary": draws.normal(size=(23, 48)).astype(np.float32)}
    return {}


@pytest.mark.parametrize("method", all_slow_but(("mae", "supervised"), methods.TABLE))
def test_a_few_steps_lower_the_loss_and_change_all_that_is_learned(method):
    fields = {"moce": {"method.num_clusters": 4, "method.centroid_width": 32, "method.blocks": "all"},
              "detection": {"method.global_blocks": (0,), "method.map_blocks": (0,)}}.get(method, {})
    config = tiny_config(fields | {"model.depth": 1, "optim.lr": 0.01, "optim.warmup": "1 steps",
                                   "train.duration": "20 steps"}, method)
    built, batch = tiny_method(config), MAKE.get(method, tiny_batch)(config)
    first = tiny_state(config, jax.tree.map(jax.numpy.asarray, extras(method, config)))
    before = {name: np.asarray(value) for name, value in flatten(first.params).items()}
    step, state, losses = tiny_step(config), first, []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        assert metrics["bad_steps"][0] == 0
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    after = flatten(state.params)
    assert {name for name, value in before.items() if (np.asarray(after[name]) != value).any()} == {
        name for name in before if built.is_trainable(name)}


def test_no_method_is_left_out():
    assert OWN.keys() == methods.TABLE.keys()
