"""Rows, pooling, and what an evaluation reports and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.config import resolved
from mae_jax.errors import UserError
from mae_jax.evals import image_grid, knn, linear_probe, reconstruction
from mae_jax.evals.accumulators import HostRows
from mae_jax.evals.context import Context, labeled_rows
from mae_jax.evals.evaluator import Evaluator
from mae_jax.methods.base import pool
from mae_jax.ops.patches import PatchGrid
from mae_jax.runtime import sharding
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_loss, tiny_method, tiny_params, tiny_state


def test_pooling_takes_the_class_token_or_the_mean_of_the_patches():
    tokens = np.random.default_rng(0).normal(size=(2, 5, 3))
    bfloat16 = jnp.asarray(tokens, jnp.bfloat16)
    assert pool(bfloat16, "mean").dtype == jnp.float32
    np.testing.assert_allclose(pool(jnp.asarray(tokens), "cls"), tokens[:, 0], rtol=1e-6)
    np.testing.assert_allclose(pool(jnp.asarray(tokens), "mean"), tokens[:, 1:].mean(1), rtol=1e-5)


@pytest.fixture
def mesh():
    return sharding.make_mesh(resolved(tiny_config()), jax.devices()[:1])


def test_rows_leave_out_padding_gray_pictures_and_unlabeled_ones(mesh):
    rows = HostRows(mesh)
    for start in (0, 4):
        batch = {"label": np.array([0, 1, -1, 2]), "valid": np.array([1, 0, 1, 1], np.float32)}
        rows.add(labeled_rows(batch), np.arange(start, start + 4), batch["label"])
    values, labels = rows.collect()
    np.testing.assert_array_equal(values, [0, 3, 4, 7])
    np.testing.assert_array_equal(labels, [0, 2, 0, 2])


@pytest.mark.parametrize(("method", "there", "count"), [
    ("mae", 3, 3), ("mae", 8, 5), ("mixedae", 5, 4), ("mixedae", 1, 4)])
def test_padding_is_not_drawn_but_where_a_mix_must_be_whole(method, there, count, mesh):
    config = tiny_config({"eval.pictures": 5}, method)
    batch = tiny_batch(config, 1, train=False)
    batch["id"][there:], batch["valid"][there:] = -1, 0
    ctx = Context(tiny_method(config), {}, {}, None, mesh, "eval", lambda: iter([batch]))
    np.testing.assert_array_equal(ctx.shown["id"], batch["id"][:count])


class Inputs:
    """What an evaluator reads: two batches of each kind, the second with padding."""

    def __init__(self, config, classes=("a", "b", "c")):
        self.config, self.classes = config, classes

    def evaluate(self, ratio=1.0):
        for seed in (1, 2):
            batch = tiny_batch(self.config, seed)
            batch["valid"][5:] = seed == 1
            yield batch

    support = validate = evaluate


def test_the_evaluation_ignores_padding_and_is_the_same_twice(mesh):
    config = tiny_config({"method.target": "pixel", "optim.ema": 0.5})
    method = tiny_method(config)
    state = tiny_state(config)
    evaluator = Evaluator(method, Inputs(config), mesh)
    values = evaluator.scalars(state)
    assert values.keys() == {"eval/loss", "eval/mean_colour_loss", "eval/linear/top1", "eval/knn/top1", "eval/rankme"}
    assert evaluator.scalars(state) == values
    losses = []
    for batch in Inputs(config).evaluate():
        batch = {name: value[batch["valid"] > 0] for name, value in batch.items()}
        _, (metrics, _) = tiny_loss(method)(state.ema, {}, batch, None, 0, False)
        losses.append(jax.device_get(metrics["loss"]))
    total, weight = np.sum(losses, 0)
    assert weight == 13
    assert values["eval/loss"] == pytest.approx(total / weight, rel=1e-5)


def test_without_labels_only_losses_and_the_rank_are_evaluated(mesh):
    config = tiny_config()
    values = Evaluator(tiny_method(config), Inputs(config, classes=()), mesh).scalars(tiny_state(config))
    assert values.keys() == {"eval/loss", "eval/rankme"}


def test_an_evaluation_split_without_labels_has_no_probes(mesh):
    config = tiny_config()
    inputs = Inputs(config)
    inputs.evaluate = lambda: iter([tiny_batch(config) | {"label": np.full(8, -1, np.int32)}])
    evaluator = Evaluator(tiny_method(config), inputs, mesh)
    assert evaluator.scalars(tiny_state(config)).keys() == {"eval/loss", "eval/rankme"}
    assert evaluator.last_evaluations(tiny_state(config)) == {}


def test_a_training_split_without_labels_has_no_probes(mesh):
    config = tiny_config()
    inputs = Inputs(config)
    inputs.support = lambda: iter([tiny_batch(config) | {"label": np.full(8, -1, np.int32)}])
    evaluator = Evaluator(tiny_method(config), inputs, mesh)
    assert evaluator.scalars(tiny_state(config)).keys() == {"eval/loss", "eval/rankme"}
    assert evaluator.last_evaluations(tiny_state(config)) == {}
    with pytest.raises(UserError, match=r"'train' has no labels"):
        evaluator.on_demand("frozen_probes", tiny_state(config))


@pytest.mark.slow
def test_raw_pixels_are_probed_in_raster_order_as_the_floor(mesh):
    config = tiny_config()
    evaluator = Evaluator(tiny_method(config), Inputs(config), mesh)
    values = evaluator.last_evaluations(tiny_state(config))
    batches = list(Inputs(config).evaluate())
    patches, order, labels, valid = (np.concatenate([batch[name] for batch in batches])
                                     for name in ("patches", "order", "label", "valid"))
    pixels = PatchGrid(4, 4, 4, 4).unpatchify(patches, order).reshape(16, -1)[valid > 0].astype(np.float32)
    probed = (pixels, labels[valid > 0])
    assert values["eval/knn/pixels_top1"] == knn.top1(probed, probed, 3, config.eval.knn_k, 0.07)
    assert values["eval/linear/pixels_top1"] == pytest.approx(linear_probe.top1(probed, probed, 3), abs=0.1)


def test_evaluations_use_the_averaged_parameters(mesh):
    config = tiny_config({"optim.ema": 0.5})
    state = tiny_state(config)
    evaluator = Evaluator(tiny_method(config), Inputs(config, classes=()), mesh)
    before = evaluator.scalars(state)
    other = jax.tree.map(jnp.asarray, tiny_params(config, seed=1))
    assert evaluator.scalars(state._replace(params=other)) == before
    assert evaluator.scalars(state._replace(ema=other)) != before


@pytest.mark.parametrize("target", ["pixel", "norm_pix"])
def test_pictures_keep_visible_patches_and_paste_predictions_into_the_hidden_ones(target):
    config = tiny_config({"method.target": target, "data.image_size": (16, 24), "model.patch": (4, 8)})
    method, batch = tiny_method(config), tiny_batch(config)
    original, masked, pasted = reconstruction.panels(method, tiny_params(config), {}, batch)
    assert original.shape == masked.shape == pasted.shape == (8, 16, 24, 3)
    np.testing.assert_array_equal(original, PatchGrid(4, 3, 4, 8).unpatchify(batch["patches"], batch["order"]))
    hidden = np.zeros((8, 4, 3), bool)
    for image, order in enumerate(batch["order"]):
        hidden[image].flat[order[method.num_visible:]] = True
    hidden = hidden.repeat(4, 1).repeat(8, 2)
    np.testing.assert_array_equal(masked[~hidden], original[~hidden])
    np.testing.assert_array_equal(pasted[~hidden], original[~hidden])
    assert (masked[hidden] == reconstruction.GRAY).all()
    assert (pasted[hidden] != original[hidden]).mean() > 0.5
    assert ("own true mean and deviation" in method.reconstruction_note) == (target == "norm_pix")


def test_tiles_lie_in_rows_with_whole_pixels():
    red, blue = (np.full((32, 48, 3), color, np.uint8) for color in ((255, 0, 0), (0, 0, 255)))
    picture = image_grid.tile([(red, blue), (blue, red)], ("left", "right"), "title")
    height, width = 32 * 4, 48 * 4
    assert picture.shape == (2 * image_grid.CAPTION + 2 * (height + 4) + 4, 2 * (width + 4) + 4, 3)
    top = 2 * image_grid.CAPTION
    assert (picture[top : top + height, 4 : 4 + width] == (255, 0, 0)).all()
    assert (picture[top : top + height, 8 + width : 8 + 2 * width] == (0, 0, 255)).all()
    assert (picture[top + height + 4 : top + 2 * height + 4, 4 : 4 + width] == (0, 0, 255)).all()


def test_captions_are_where_they_belong_and_do_not_run_into_each_other():
    blank = np.full((128, 128, 3), 255, np.uint8)
    rows = image_grid.paired([(blank, blank)] * 3)
    bare = image_grid.tile(rows, (), "")
    top, step = 2 * image_grid.CAPTION, 128 + image_grid.GAP
    assert bare.shape == (top + 2 * step + image_grid.GAP, 4 * step + image_grid.GAP, 3)
    long = "a very long name of a file " * 9
    drawn = image_grid.tile(rows, (), "", below=("", long, long))
    tall = step + image_grid.CAPTION
    ink = [(drawn[top + y * tall + 128:top + (y + 1) * tall, x * step + 2:(x + 2) * step] < 200).any()
           for y in (0, 1) for x in (0, 2)]
    assert ink == [False, True, True, False]  # the third image is beside the first
    words = image_grid.tile(rows, ("",), "a title that is too long " * 9)
    assert words.shape[0] > bare.shape[0]
    names = image_grid.tile(rows, (), "", names=("25% masked\nof all", ""))
    assert names.shape[1] == bare.shape[1] + image_grid.NAME
    assert (names[top:top + 128, :image_grid.NAME] < 200).any()
    assert not (names[top + step:, :image_grid.NAME] < 200).any()


@pytest.mark.slow
def test_one_picture_is_shown_at_several_ratios_whatever_it_was_trained_with():
    config = tiny_config({"method.masking": "grid", "method.target": "pixel"})
    picture = reconstruction.at_ratios(tiny_method(config), tiny_params(config), {}, tiny_batch(config))
    assert picture.shape[0] == 2 * image_grid.CAPTION + len(reconstruction.RATIOS) * (128 + 4) + 4
    assert picture.dtype == np.uint8
