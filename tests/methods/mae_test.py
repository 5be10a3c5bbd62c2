"""The masked autoencoder: what is visible, what the loss is, and what a prediction looks like."""

import jax
import numpy as np
import pytest

from mae_jax.config import default, validate
from mae_jax.errors import UserError
from mae_jax.losses import pixel_targets
from mae_jax.methods.mae import visible_patches
from mae_jax.ops.patches import MEAN, STD, denormalize, normalize
from mae_jax.training.throughput import train_flops
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_method, tiny_params


@pytest.mark.parametrize(("patches", "ratio", "visible"), [
    (196, 0.75, 49), (256, 0.75, 64), (50, 0.9, 4), (256, 0.85, 38), (196, 0.5, 98)])
def test_visible_patches_are_truncated_in_floating_point_as_published(patches, ratio, visible):
    assert visible_patches(patches, ratio) == visible


def standardized(patches: np.ndarray) -> np.ndarray:
    pixels = patches.reshape(*patches.shape[:2], -1, 3) / 255
    return ((pixels - np.array(MEAN)) / np.array(STD)).reshape(patches.shape)


def with_prediction(method, predicted):
    method.predict = lambda params, batch: predicted
    return method


def loss_of(method, batch, extras=None, train=True):
    loss, (metrics, _) = method.loss({}, extras or {}, batch, None, 0, train)
    return float(loss), metrics


def test_the_loss_of_pixels_is_the_mean_square_over_hidden_standardized_pixels():
    config = tiny_config({"method.target": "pixel"})
    batch, predicted = tiny_batch(config), np.random.default_rng(1).normal(size=(8, 12, 48)).astype(np.float32)
    wanted = np.mean((predicted - standardized(batch["patches"])[:, 4:]) ** 2)
    loss, metrics = loss_of(with_prediction(tiny_method(config), predicted), batch)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert set(metrics) == {"loss"}


def test_the_loss_of_normalised_pixels_uses_the_unbiased_variance_of_each_patch():
    config = tiny_config()
    batch, predicted = tiny_batch(config), np.random.default_rng(1).normal(size=(8, 12, 48)).astype(np.float32)
    hidden = standardized(batch["patches"])[:, 4:]
    deviation = np.sqrt(hidden.var(-1, ddof=1, keepdims=True) + 1e-6)
    wanted = np.mean((predicted - (hidden - hidden.mean(-1, keepdims=True)) / deviation) ** 2)
    loss, _ = loss_of(with_prediction(tiny_method(config), predicted), batch)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_pca_keeps_as_much_of_the_first_batch_as_its_best_linear_basis():
    config = tiny_config({"method.target": "pca", "data.image_size": (32, 32), "model.patch": (8, 8)})
    method, batch = tiny_method(config), tiny_batch(config)
    assert method.outputs == 96
    pixels = standardized(batch["patches"]).reshape(-1, 192)
    centered = pixels - pixels.mean(0)
    left, values, right = np.linalg.svd(centered, full_matrices=False)
    best = (left[:, :96] * values[:96]) @ right[:96] + pixels.mean(0)
    pca = pixel_targets.fit_pca(normalize(batch["patches"]), 96)
    projected = pixel_targets.project_pca(normalize(batch["patches"]), pca)
    kept = pixel_targets.unproject_pca(projected, pca).reshape(-1, 192)
    np.testing.assert_allclose(np.mean((kept - pixels) ** 2), np.mean((best - pixels) ** 2), rtol=1e-2)
    np.testing.assert_allclose(kept, best, atol=0.02 * abs(best).max())
    np.testing.assert_allclose(pca["axes"].T @ pca["axes"], np.eye(96), atol=1e-4)


def test_the_loss_of_pca_is_the_mean_square_of_coefficients():
    config = tiny_config({"method.target": "pca"})
    batch, predicted = tiny_batch(config), np.random.default_rng(1).normal(size=(8, 12, 48)).astype(np.float32)
    pca = jax.tree.map(np.asarray, pixel_targets.fit_pca(normalize(batch["patches"]), 48))
    wanted = np.mean((predicted - (standardized(batch["patches"])[:, 4:] - pca["mean"]) @ pca["axes"]) ** 2)
    loss, _ = loss_of(with_prediction(tiny_method(config), predicted), batch, {"pca": pca})
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)


def test_the_evaluation_reports_what_the_mean_color_of_the_visible_patches_costs():
    config = tiny_config({"method.target": "pixel"})
    batch, predicted = tiny_batch(config), np.zeros((8, 12, 48), np.float32)
    batch["valid"][:3] = 0
    pixels = standardized(batch["patches"]).reshape(8, 16, 16, 3)
    color = pixels[:, :4].mean((1, 2), keepdims=True)
    wanted = np.mean((pixels[3:, 4:] - color[3:]) ** 2)
    _, metrics = loss_of(with_prediction(tiny_method(config), predicted), batch, train=False)
    total, weight = metrics["mean_colour_loss"]
    assert weight == 5
    np.testing.assert_allclose(total / weight, wanted, rtol=1e-5)


@pytest.mark.slow
def test_invalid_rows_change_neither_loss_nor_gradients():
    config = tiny_config()
    method, params, batch = tiny_method(config), tiny_params(config), tiny_batch(config)
    batch["valid"][[1, 6]] = 0
    other = batch | {"patches": batch["patches"].copy()}
    other["patches"][[1, 6]] = 127
    compute = jax.jit(jax.value_and_grad(lambda params, batch: method.loss(params, {}, batch, None, 0, True)[0]))
    first, second = compute(params, batch), compute(params, other)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    kept = [0, 2, 3, 4, 5, 7]
    alone, _ = compute(params, {name: value[kept] for name, value in batch.items()})
    np.testing.assert_allclose(first[0], alone, rtol=1e-6)


def test_a_batch_without_any_valid_row_has_loss_and_gradients_zero():
    config = tiny_config()
    method, batch = tiny_method(config), tiny_batch(config)
    batch["valid"][:] = 0
    grads = jax.jit(jax.grad(lambda p: method.loss(p, {}, batch, None, 0, True)[0]))(tiny_params(config))
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_encode_sees_whole_images_whatever_is_masked():
    config = tiny_config()
    params, batch = tiny_params(config), tiny_batch(config)
    tokens = [jax.jit(tiny_method(tiny_config({"method.mask_ratio": ratio})).encode)(params, {}, batch)
              for ratio in (0.75, 0.5)]
    assert tokens[0].shape == (8, 17, 32)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    changed = batch | {"patches": batch["patches"].copy()}
    changed["patches"][:, -1] ^= 255  # hidden in training
    assert abs(jax.jit(tiny_method(config).encode)(params, {}, changed)[:, 0] - tokens[0][:, 0]).max() > 1e-4


@pytest.mark.parametrize("target", ["norm_pix", "pixel", "pca"])
def test_a_perfect_prediction_reconstructs_the_original_pixels(target):
    config = tiny_config({"method.target": target})
    method, batch = tiny_method(config), tiny_batch(config)
    extras = {"pca": pixel_targets.fit_pca(normalize(batch["patches"]), 48)} if target == "pca" else {}
    hidden = batch["patches"][:, method.num_visible:]
    with_prediction(method, method.targets(extras, normalize(hidden)))
    pixels = denormalize(np.asarray(method.reconstruct({}, extras, batch)["pixels"]))
    np.testing.assert_array_equal(np.rint(pixels), hidden)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"method.encoder_mask_tokens": True}, {"method.target": "pca"}])
def test_flops_agree_with_the_compilers_count_of_the_unrolled_step(fields):
    config = default("mae")
    config.update_from_flattened_dict(fields)
    validate(config)
    config.batch_size = 1
    method = tiny_method(config)
    batch = method.batch_spec()
    params, extras = jax.eval_shape(method.init, jax.random.key(0), batch)

    def loss(params, extras, batch):
        return method.loss(params, extras, batch, None, 0, True)[0]

    # Before XLA's optimizations, which take half a minute to compile and add less than one per cent to the count.
    counted = jax.jit(jax.grad(loss)).lower(params, extras, batch).cost_analysis()["flops"]
    assert train_flops(method) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(("fields", "line"), [
    ({"method.mask_ratio": 0.99}, "leaves 0 of 16 patches visible"),
    ({"method.mask_ratio": -0.5}, "leaves 24 of 16 patches visible"),
    ({"method.target": "pixels"}, "did you mean 'pixel'?"),
    ({"method.masking": "blok"}, "did you mean 'block'?"),
    ({"method.decoder_heads": 0}, "must be at least 1"),
    ({"method.decoder_width": 18}, "multiple of"),
    ({"model.drop_path": 0.1}, "without stochastic depth"),
])
def test_fields_that_cannot_work_are_refused_in_one_line(fields, line):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        tiny_config(fields)
    assert line in str(error.value)
