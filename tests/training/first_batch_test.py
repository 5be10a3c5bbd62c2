"""The figure of the first batch: what it shows is what the step trains on, whatever the method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mae_jax.evals import input_grid
from mae_jax.methods.base import GRAY
from mae_jax.rng import stream_key
from mae_jax.runtime import sharding
from mae_jax.training import first_batch
from mae_jax.training import run as training_run
from tests.helpers.tiny import tiny_config

DATA = {"data.source": "photo_crops", "data.train_split": "train[:64]", "data.eval_split": "test[:8]"}
PANELS = {
    "beit": ["input", "visible"],
    "dino": ["global view 1", "global view 2", "local view 1", "local view 2", "local view 3"],
    "mae": ["input", "visible"],
    "mixedae": ["input", "its share", "mix"],
    "splitmask": ["input", "half A", "half B"],
    "supervised": ["input"],
}


def prepared(method, **fields):
    own = {"method.classes": 17} if method == "supervised" else {}
    config = tiny_config(DATA | own | {"eval.pictures": 8} | fields, method)
    return training_run.prepare(config, epath.Path("unread"))


@pytest.mark.parametrize("method", PANELS)
def test_every_method_shows_its_views_masks_and_mixes(method):
    run = prepared(method)
    batch = next(run.inputs.train(0))
    images = run.program.method.input_images(batch)
    assert list(images) == PANELS[method]
    assert {value.dtype for value in images.values()} == {np.dtype(np.uint8)}
    if method in ("beit", "mae"):
        patches, masked = batch["patches"].shape[1], run.program.method.patch_order().num_masked
        hidden = np.all(images["visible"].reshape(8, 4, 4, 4, 4, 3) == GRAY, axis=(2, 4, 5)).sum()
        assert hidden == 8 * masked < 8 * patches
    if method == "splitmask":  # each patch is in one of the halves
        there = [np.any(images[name] != GRAY, axis=-1) for name in ("half A", "half B")]
        assert not np.logical_and(*there).any()
    if method == "mixedae":  # the shares of a group make up its mix
        group = run.program.method.group
        share, mix = images["its share"][:group].astype(int), images["mix"]
        np.testing.assert_array_equal(np.where(share != GRAY, share, 0).max(0), np.where(mix[0] != GRAY, mix[0], 0))
        np.testing.assert_array_equal(mix[0], mix[group - 1])


@pytest.mark.parametrize("parts", [1, 2])
def test_mixed_and_erased_images_are_those_of_the_first_step(monkeypatch, parts):
    fields = {"method.mixup": 0.8, "method.cutmix": 1.0, "method.erase": 0.5, "method.mix_group": 2}
    run = prepared("supervised", **fields, **{"train.accumulate": parts})
    method, mesh, seen = run.program.method, run.program.mesh, []
    # What the encoder is given, and no encoder.
    def encode(params, extras, batch, **_):
        seen.append(batch["pixels"])
        return jnp.zeros((8 // parts, 2, 32))

    method.encode = encode
    # Which takes long to compile.
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b, shape: jax.random.uniform(key, shape))

    @jax.jit
    def trained_on(rows, key):
        method.loss(jax.tree.map(lambda x: jnp.zeros(x.shape), run.program.state.params), {}, rows, key, 0, True)
        return seen.pop()

    with jax.set_mesh(mesh):
        batch = next(training_run.device_batches(run, 0))
        few = first_batch.rows_trained_on(method, 8, sharding.replicated(mesh))(batch)
        key = stream_key(method.config.seed, jnp.zeros((), jnp.int32), "loss")
        key = jax.random.fold_in(key, 0) if parts > 1 else key
        # Rows are dealt out to micro-batches one by one, as the train step does.
        first = {name: value[np.array([0, 2, 4, 6])] if parts > 1 else value for name, value in batch.items()}
        np.testing.assert_allclose(few["augmented"], trained_on(first, key), atol=1e-5)
    np.testing.assert_array_equal(few["id"], first["id"])


def test_the_figure_is_drawn_and_what_cannot_be_drawn_is_a_warning(caplog):
    run = prepared("mae")
    with jax.set_mesh(run.program.mesh):
        batch = next(training_run.device_batches(run, 0))
        drawn = first_batch.figure(run, batch)
        assert drawn.dtype == np.uint8
        assert drawn.shape[2] == 3
        assert drawn.shape[1] == 8 * (112 + input_grid.GAP)
        run.program.method.input_images = lambda batch: 1 / 0
        assert first_batch.figure(run, batch) is None
    assert "no figure of the first batch: division by zero" in caplog.text
