"""The dense probe: its loss over pixels, what learns, and what a prediction of patches looks like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.config import default, validate
from mae_jax.errors import UserError
from mae_jax.losses import segmentation
from mae_jax.methods.segmentation import upsampling_flops
from mae_jax.models.upernet import map_blocks
from mae_jax.ops import resampling
from mae_jax.param_tree import flatten
from tests.helpers.tiny import (
    tiny_method,
    tiny_params,
    tiny_program,
    tiny_segment,
    tiny_segment_batch,
    tiny_state,
    tiny_step,
)


def test_the_loss_is_the_mean_cross_entropy_of_pixels_that_have_a_class():
    config = tiny_segment()
    method, batch = tiny_method(config), tiny_segment_batch(config)
    batch["valid"][2] = 0
    logits = np.random.default_rng(1).normal(size=(8, 16, 16, 3)).astype(np.float32)
    method._linear_logits = lambda *_, **__: (jnp.asarray(logits), {})
    loss, (metrics, _) = method.loss({}, {}, batch, None, 0, False)
    mask = batch["pixel_label"].reshape(8, 4, 4, 4, 4).swapaxes(2, 3).reshape(8, 16, 16)
    known = (mask < 3) & (batch["valid"] > 0)[:, None, None]
    assert 0 < known.sum() < mask.size / 2
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = [-np.log(chances[i, y, x, mask[i, y, x]]) for i, y, x in np.argwhere(known)]
    np.testing.assert_allclose(loss, np.mean(wanted), rtol=1e-5)
    assert metrics["loss"][1] == known.sum()
    right = (logits.argmax(-1) == mask)[known].sum()
    assert metrics["pixel_accuracy"] == (right, known.sum())


def test_a_batch_without_any_class_has_loss_and_gradients_zero():
    config = tiny_segment({"method.train_blocks": -1})
    method, batch = tiny_method(config), tiny_segment_batch(config)
    batch["pixel_label"][:] = segmentation.IGNORED
    compute = jax.jit(jax.value_and_grad(lambda p: method.loss(p, {}, batch, None, 0, True)[0]))
    loss, grads = compute(tiny_params(config))
    assert loss == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(("block", "trained", "some"), [
    (-1, 0, {"head/kernel"}),
    (-1, 1, {"head/kernel", "encoder/block_01/attn/qkv/kernel", "encoder/norm/scale"}),
    (0, 1, {"head/kernel", "encoder/block_00/attn/qkv/kernel"}),
    (-1, -1, {"head/kernel", "encoder/block_00/attn/qkv/kernel", "encoder/block_01/attn/qkv/kernel",
              "encoder/norm/scale", "encoder/patch_embed/kernel"}),
    (0, -1, {"head/kernel", "encoder/block_00/attn/qkv/kernel", "encoder/patch_embed/kernel"}),
])
def test_what_learns_is_what_has_a_gradient(block, trained, some):
    config = tiny_segment({"method.block": block, "method.train_blocks": trained})
    method, batch = tiny_method(config), tiny_segment_batch(config)
    grads = jax.jit(jax.grad(lambda p: method.loss(p, {}, batch, None, 0, True)[0]))(tiny_params(config))
    moved = {name for name, leaf in flatten(grads).items() if np.any(np.abs(leaf) > 1e-7)}
    watched = {"head/kernel", "encoder/patch_embed/kernel", "encoder/norm/scale",
               "encoder/block_00/attn/qkv/kernel", "encoder/block_01/attn/qkv/kernel"}
    assert moved & watched == some
    assert moved <= {name for name in flatten(grads) if method.is_trainable(name)}
    assert {name for name in watched if method.is_trainable(name)} == some


def test_an_earlier_block_is_classified_after_a_norm_without_parameters():
    config = tiny_segment({"method.block": 0})
    method, params, batch = tiny_method(config), tiny_params(config), tiny_segment_batch(config)
    logits = jax.jit(method.pixel_logits)(params, {}, batch)
    tokens = np.asarray(method.encode(params, {}, batch, 0))[:, 1:]
    normed = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    wanted = (normed @ params["head"]["kernel"] + params["head"]["bias"]).reshape(8, 4, 4, 3)
    np.testing.assert_allclose(logits, resampling.upsample(wanted, (4, 4)), atol=1e-4)


def test_a_probe_classifies_normalized_tokens_of_all_valid_images_and_follows_their_moments():
    config = tiny_segment({"method.head": "probe"})
    method, params, batch = tiny_method(config), tiny_params(config), tiny_segment_batch(config)
    batch["valid"][6:] = 0
    _, extras = jax.jit(method.init)(jax.random.key(0), batch)
    tokens = np.asarray(method.encode(params, {}, batch), np.float64)[:, 1:]
    head = {name: np.asarray(leaf, np.float64) for name, leaf in params["head"].items()}

    def wanted(mean, var):
        """The mean cross-entropy per pixel of a head behind these moments."""
        cells = ((tokens - mean) / np.sqrt(var + 1e-6)) @ head["kernel"] + head["bias"]
        logits = jnp.asarray(np.asarray(resampling.upsample(cells.reshape(8, 4, 4, 3).astype(np.float32), (4, 4))))
        total, _ = segmentation.over_pixels(logits, method.pixel_classes(batch))
        return total / (np.asarray(method.pixel_classes(batch)) != segmentation.IGNORED).sum()

    compute = jax.jit(method.loss, static_argnums=5)
    loss, (_, after) = compute(params, extras, batch, jax.random.key(0), 0, True)
    known = tokens[:6].reshape(-1, tokens.shape[-1])
    np.testing.assert_allclose(loss, wanted(known.mean(0), known.var(0)), rtol=1e-4)
    np.testing.assert_allclose(after["batch_norm"]["mean"], 0.1 * known.mean(0), atol=1e-5)
    np.testing.assert_allclose(after["batch_norm"]["var"], 0.9 + 0.1 * known.var(0, ddof=1), rtol=1e-4)
    loss, (_, still) = compute(params, after, batch, jax.random.key(0), 0, False)
    np.testing.assert_allclose(loss, wanted(*(np.asarray(after["batch_norm"][name]) for name in ("mean", "var"))),
                               rtol=1e-4)
    np.testing.assert_array_equal(still["batch_norm"]["mean"], after["batch_norm"]["mean"])


def test_a_head_on_random_features_learns_what_the_color_tells():
    config = tiny_segment({"optim.lr": 3.0, "optim.weight_decay": 0.0, "train.duration": "60 steps"})
    batch = tiny_segment_batch(config)
    bright = batch["patches"].reshape(8, 16, 16, 3).mean(-1) > 128
    batch["pixel_label"] = bright.astype(np.uint8)
    step, state, losses = tiny_step(config), tiny_state(config), []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
def test_flops_agree_with_the_compilers_count_of_the_forward_pass():
    config = default("segment")
    config.method.classes = 150
    validate(config)
    config.batch_size = 1
    method = tiny_method(config)
    params, _ = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
    lowered = jax.jit(lambda p, b: method.pixel_logits(p, {}, b)).lower(params, method.batch_spec())
    assert method.forward_flops() == pytest.approx(lowered.cost_analysis()["flops"], rel=0.05)


@pytest.mark.parametrize(("fields", "line"), [
    ({"method.classes": 1}, "method.classes=1; expected 2 to 255"),
    ({"method.classes": 256}, "method.classes=256; expected 2 to 255"),
    ({"method.background": 3}, "method.background=3; expected 0 to 2, or -1 for none"),
    ({"method.block": 2}, "method.block=2; expected 0 to 1"),
    ({"method.train_blocks": 3}, "method.train_blocks=3; expected 0 to 2"),
    ({"method.head": "uper"}, "method.head='uper'; did you mean 'upernet'?"),
    ({"method.blocks": "0,1"}, "method.blocks='0,1' is read with method.head=upernet only"),
    ({"method.relative_position_bias": True},
     "method.relative_position_bias=True is read with method.head=upernet only"),
    ({"method.head": "upernet", "method.block": 1}, "method.block=1 is not read with method.head=upernet"),
    ({"method.head": "upernet", "method.blocks": "0,0,1,2"}, "expected 4 of the blocks 0 to 1"),
    ({"method.head": "upernet", "method.blocks": "1,0,1,1"}, "in their order"),
    ({"method.head": "upernet", "method.norm": "group"}, "method.norm='group'"),
    ({"method.head": "upernet", "method.dropout": 1.0}, "method.dropout=1.0; expected 0 to below 1"),
    ({"method.head": "upernet", "method.aux_width": 0}, "method.aux_width=0; it must be at least 1"),
    ({"method.head": "upernet", "method.relative_position_bias": True, "method.test": "whole"},
     "use method.test=slide"),
    ({"method.test": "slide", "method.stride": (17, 4)}, "method.stride=(17, 4)"),
    ({"data.scales": (2.0, 0.5)}, "data.scales=(2.0, 0.5); expected two numbers above 0"),
])
def test_fields_that_cannot_work_are_refused_in_one_line(fields, line):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        tiny_segment(fields)
    assert line in str(error.value)


UPERNET = {"method.head": "upernet", "method.train_blocks": -1, "method.head_width": 8, "method.aux_width": 4}


@pytest.mark.parametrize(("depth", "text", "blocks"), [
    (12, "auto", (3, 5, 7, 11)), (24, "auto", (7, 11, 15, 23)), (2, "auto", (0, 0, 0, 1)),
    (6, "1, 2,3,5", (1, 2, 3, 5))])
def test_maps_are_of_the_published_blocks_or_of_those_that_are_named(depth, text, blocks):
    config = tiny_segment({"model.depth": depth, "method.head": "upernet", "method.blocks": text})
    assert map_blocks(config) == blocks


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "still"), [
    ({}, {"encoder/norm/scale"}),
    ({"method.encoder_norm": True}, set()),
    ({"method.blocks": "0,0,0,0"}, {"encoder/norm/scale", "encoder/block_01/attn/qkv/kernel"}),
    ({"method.train_blocks": 1}, {"encoder/norm/scale", "encoder/block_00/attn/qkv/kernel",
                                  "encoder/patch_embed/kernel"})])
def test_what_upernet_reads_learns_and_nothing_else(fields, still):
    config = tiny_segment({**UPERNET, "method.relative_position_bias": True, **fields})
    method, batch = tiny_method(config), tiny_segment_batch(config)
    params = tiny_params(config)
    _, extras = jax.jit(method.init)(jax.random.key(0), batch)
    grads = flatten(jax.jit(jax.grad(lambda p: method.loss(p, extras, batch, jax.random.key(0), 0, True)[0]))(params))
    moved = {name for name, leaf in grads.items() if np.any(np.abs(leaf) > 1e-9)}
    watched = {"encoder/norm/scale", "encoder/patch_embed/kernel", "encoder/block_00/attn/qkv/kernel",
               "encoder/block_01/attn/qkv/kernel"}
    assert watched - moved == still
    before_norm = {"upernet/rescale_0/double/bias"}  # whose gradient is 0, but for rounding
    assert moved | before_norm == {name for name in grads if method.is_trainable(name)}
    tables = {name for name in moved if name.endswith("relative_position_bias")}
    assert tables == {f"encoder/block_{n:02d}/attn/relative_position_bias" for n in range(2)
                      if f"encoder/block_{n:02d}/attn/qkv/kernel" not in still}


@pytest.mark.slow
def test_channels_are_dropped_by_the_address_of_the_image_and_scaled_up():
    config = tiny_segment({**UPERNET, "method.dropout": 0.5, "method.norm": "layer"})
    method, batch, params = tiny_method(config), tiny_segment_batch(config), tiny_params(config)
    def train(key):
        return method._upernet_logits(params, {}, batch, key=key)[0]
    first, again, other = (jax.jit(train)(jax.random.key(n))[0] for n in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    none, whole = method._upernet_logits(params, {}, batch)[0][0], []
    for n in range(64):
        whole.append(jax.jit(train)(jax.random.key(n))[0])
    spread = np.std(whole, 0).mean() / 8
    assert np.abs(np.mean(whole, 0) - none).mean() < 3 * spread


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_upernet_learns_what_the_color_tells_and_follows_the_moments_of_its_batches(norm):
    config = tiny_segment({**UPERNET, "method.norm": norm, "optim.lr": 0.3, "optim.schedule": "poly",
                           "train.duration": "60 steps", "model.positions": "learned", "method.dropout": 0.0,
                           "method.head_width": 32, "method.aux_width": 16})
    batch = tiny_segment_batch(config)
    bright = batch["patches"].mean(-1, keepdims=True) > 128
    batch["pixel_label"] = np.broadcast_to(bright, (8, 16, 16)).astype(np.uint8)
    method = tiny_method(config)
    params, extras = jax.jit(method.init)(jax.random.key(0), batch)
    step, state, losses = tiny_step(config), tiny_state(config, extras)._replace(params=params), []
    before = flatten(jax.device_get(extras))
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["main_loss"][0] / metrics["main_loss"][1]))
    assert losses[0] > 1
    assert losses[-1] < 0.35  # knowing how many of each class there are gives ln 2 = 0.69
    after = flatten(state.extras)
    assert bool(before) == (norm == "batch")
    assert all(np.abs(after[name] - value).max() > 1e-3 for name, value in before.items())


def test_batch_norm_refuses_micro_batches_and_layer_norm_takes_them():
    config = tiny_segment({**UPERNET, "train.accumulate": 2})
    with pytest.raises(UserError, match=r"train\.accumulate=2"):
        tiny_program(config, jax.devices()[:1])
    tiny_program(tiny_segment({**UPERNET, "train.accumulate": 2, "method.norm": "layer"}), jax.devices()[:1])
    with pytest.raises(UserError, match=r"train\.accumulate=2"):
        tiny_program(tiny_segment({"method.head": "probe", "train.accumulate": 2}), jax.devices()[:1])


@pytest.mark.slow
def test_flops_of_upernet_agree_with_the_compilers_count_of_the_forward_pass():
    config = default("segment")
    config.data.image_size, config.batch_size = (256, 256), 1
    config.method.update(classes=150, head="upernet")
    validate(config)
    method = tiny_method(config)
    params, extras = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
    lowered = jax.jit(lambda p, e, b: [method._upernet_logits(p, e, b)[0]]).lower(params, extras, method.batch_spec())
    upsampled = method.forward_flops() - sum(upsampling_flops(cells, (256, 256), 150) for cells in ((64, 64), (16, 16)))
    assert upsampled == pytest.approx(lowered.cost_analysis()["flops"], rel=0.05)
