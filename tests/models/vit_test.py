"""Encoder and decoder: sizes, positions, and the equalities that permuted patches and scanned layers promise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.config import default, vit
from mae_jax.models.layers import sincos_positions
from mae_jax.models.vit import make_decoder, make_encoder
from mae_jax.ops.normalization import EPS
from mae_jax.param_tree import flatten
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_method, tiny_params


@pytest.mark.slow
@pytest.mark.parametrize(("size", "patch", "count"), [
    ("B", 16, 111_655_680), ("L", 16, 329_239_296), ("H", 14, 656_613_964)])
def test_trainable_parameters_are_as_many_as_in_the_published_models(size, patch, count):
    config = default("mae")
    config.model.update(vit(size, patch))
    method = tiny_method(config)
    params, _ = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("grid", [(14, 14), (3, 5), (1, 2)])
def test_positions_are_the_published_formula(grid):
    width = 16
    wanted = np.zeros((grid[0] * grid[1], width))
    for row in range(grid[0]):
        for column in range(grid[1]):
            for half, place in enumerate((column, row)):
                for k in range(width // 4):
                    angle = place / 10000 ** (k / (width / 4))
                    wanted[row * grid[1] + column, half * width // 2 + k] = math.sin(angle)
                    wanted[row * grid[1] + column, half * width // 2 + width // 4 + k] = math.cos(angle)
    np.testing.assert_allclose(sincos_positions(grid, width), wanted, atol=1e-7)


@pytest.fixture(scope="module")
def unrolled():
    """Parameters, and their loss and gradients without scan or remat."""
    params = tiny_params(tiny_config())
    return params, value_and_grad(tiny_config(), params)


def value_and_grad(config, params):
    method, batch = tiny_method(config), tiny_batch(config)
    return jax.jit(jax.value_and_grad(lambda params: method.loss(params, {}, batch, None, 0, True)[0]))(params)


@pytest.mark.slow
@pytest.mark.parametrize(("scan", "remat"), [
    (True, "none"), (True, "full"), (True, "dots"), (False, "full"), (False, "dots")])
def test_scan_and_remat_change_neither_loss_nor_gradients(unrolled, scan, remat):
    params, (loss, grads) = unrolled
    other_loss, other = value_and_grad(tiny_config({"model.scan": scan, "model.remat": remat}), params)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    assert flatten(other).keys() == flatten(grads).keys()
    for name, grad in flatten(grads).items():
        np.testing.assert_allclose(flatten(other)[name], grad, atol=2e-6 * float(abs(grad).max()) + 1e-8, err_msg=name)


def init(config):
    return jax.jit(tiny_method(config).init)(jax.random.key(0), tiny_batch(config))[0]


def test_scanned_and_unrolled_models_have_the_same_initial_parameters():
    first, second = (init(tiny_config({"model.scan": scan})) for scan in (False, True))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
def test_kernels_start_xavier_uniform_over_the_whole_qkv_matrix_and_biases_at_zero():
    config = tiny_config({"model.width": 64, "model.heads": 4})
    params = flatten(init(config))
    for name, leaf in params.items():
        if name.endswith("kernel"):
            limit = math.sqrt(6 / sum(leaf.shape))  # MAE A.1; one matrix for q, k and v
            assert 0.95 * limit < abs(leaf).max() <= limit, name
        elif name.endswith("bias"):
            assert not leaf.any(), name
        elif name.endswith("token"):
            assert 0.01 < leaf.std() < 0.03, name


def jitted(config):
    return jax.jit(make_encoder(config).apply, static_argnames="block")


@pytest.fixture(scope="module")
def encoder():
    config = tiny_config()
    batch = tiny_batch(config)
    pixels = np.random.default_rng(0).normal(size=batch["patches"].shape).astype(np.float32)
    return jitted(config), {"params": tiny_params(config)["encoder"]}, pixels, batch["order"]


def test_permuting_patches_with_their_order_permutes_tokens(encoder):
    encode, params, pixels, order = encoder
    tokens = encode(params, pixels, order)
    shuffle = np.random.default_rng(0).permutation(order.shape[1])
    shuffled = encode(params, pixels[:, shuffle], order[:, shuffle])
    np.testing.assert_allclose(shuffled[:, 0], tokens[:, 0], atol=2e-6)
    np.testing.assert_allclose(shuffled[:, 1:], tokens[:, 1:][:, shuffle], atol=2e-6)


def test_permuting_patches_without_their_order_changes_the_class_token(encoder):
    encode, params, pixels, order = encoder
    tokens = encode(params, pixels, order)
    assert abs(encode(params, pixels[:, ::-1], order)[:, 0] - tokens[:, 0]).max() > 1e-3


def test_block_k_is_the_output_of_block_k_before_the_final_norm(encoder):
    encode, params, pixels, order = encoder
    last = encode(params, pixels, order, block=1)
    norm = params["params"]["norm"]
    normed = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + EPS)
    np.testing.assert_allclose(normed * norm["scale"] + norm["bias"], encode(params, pixels, order), atol=1e-5)
    shorter = jitted(tiny_config({"model.depth": 1}))
    np.testing.assert_allclose(shorter(params, pixels, order, block=0),
                               encode(params, pixels, order, block=0), atol=1e-6)
    assert abs(encode(params, pixels, order, block=0) - last).max() > 1e-2


def test_encoder_mask_tokens_stand_in_for_the_hidden_patches():
    config = tiny_config({"method.encoder_mask_tokens": True})
    method, batch = tiny_method(config), tiny_batch(config)
    params = tiny_params(config)
    assert params["encoder"]["mask_token"].shape == (1, 1, 32)

    def loss(params, batch):
        return method.loss(params, {}, batch, None, 0, True)[0]

    grads = jax.jit(jax.grad(loss))(params, batch)
    assert abs(grads["encoder"]["mask_token"]).max() > 0
    # The decoder appends nothing then: all its tokens come from the encoder.
    assert not grads["decoder"]["mask_token"].any()
    assert jax.eval_shape(method.encode, params, {}, batch).shape == (8, 17, 32)


def test_predictions_do_not_depend_on_hidden_pixels():
    for masks in (False, True):
        config = tiny_config({"method.encoder_mask_tokens": masks})
        method, batch = tiny_method(config), tiny_batch(config)
        params = tiny_params(config)
        other = batch | {"patches": batch["patches"].copy()}
        other["patches"][:, method.num_visible:] = 0
        predict = jax.jit(method.predict)
        np.testing.assert_array_equal(predict(params, batch), predict(params, other))


def test_non_square_pictures_and_patches_work():
    config = tiny_config({"data.image_size": (16, 48), "model.patch": (4, 8)})
    method, batch = tiny_method(config), tiny_batch(config)
    assert method.encoder.grid == (4, 6)
    params = tiny_params(config)
    assert jax.eval_shape(method.predict, params, batch).shape == (8, 18, 96)
    assert np.isfinite(jax.jit(method.loss, static_argnums=5)(params, {}, batch, None, 0, True)[0])


@pytest.mark.slow
def test_the_decoder_predicts_the_hidden_rows_of_what_it_would_predict_for_all():
    config = tiny_config()
    decoder = make_decoder(config, 48)
    order = tiny_batch(config)["order"]
    tokens = jax.random.normal(jax.random.key(0), (8, 5, 32))
    params = {"params": tiny_params(config)["decoder"]}
    predict = jax.jit(decoder.apply, static_argnums=3)
    every = predict(params, tokens, order, 16)
    assert every.shape == (8, 16, 48)
    np.testing.assert_allclose(predict(params, tokens, order, 12), every[:, 4:], atol=1e-6)


@pytest.mark.slow
def test_bfloat16_activations_keep_float32_parameters_and_predictions():
    config = tiny_config({"model.dtype": "bfloat16"})
    method, batch = tiny_method(config), tiny_batch(config)
    params = tiny_params(config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert jax.eval_shape(method.encode, params, {}, batch).dtype == jnp.bfloat16
    predicted = jax.jit(method.predict)(params, batch)
    assert predicted.dtype == jnp.float32
    exact = jax.jit(tiny_method(tiny_config({"model.dtype": "float32"})).predict)(params, batch)
    np.testing.assert_allclose(predicted, exact, atol=0.05 * float(abs(exact).max()))
