"""UperNet and relative position biases, beside transformers' UperNetForSemanticSegmentation (make_upernet.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.interop.upernet import from_hf
from mae_jax.methods.segmentation import MOMENTS
from mae_jax.ops.convolution import greatest, transposed
from mae_jax.ops.patches import PatchGrid
from mae_jax.param_tree import flatten
from tests.helpers.tiny import tiny_method, tiny_segment

GRID = PatchGrid(4, 4, 16, 16)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "upernet.npz") as file:
        return dict(file)


def under(golden, prefix):
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def given(golden):
    """Returns the method, its parameters, extras and batch, of the same numbers."""
    config = tiny_segment({
        "batch_size": 3, "data.image_size": (64, 64), "model.patch": (16, 16), "model.width": 16, "model.depth": 4,
        "model.heads": 2, "model.positions": "learned", "model.layer_scale": 0.1, "method.classes": 5,
        "method.head": "upernet", "method.blocks": "0,1,2,3", "method.relative_position_bias": True,
        "method.head_width": 12, "method.aux_width": 8, "method.dropout": 0.0, "method.train_blocks": -1})
    params = from_hf(under(golden, "weights/"))
    moments = params.pop("extras")[MOMENTS]
    zeros = np.zeros(16, np.float32)
    params["encoder"]["norm"] = {"scale": zeros + 1, "bias": zeros}  # which nothing reads
    images, labels = golden["images"], golden["labels"]
    batch = {"patches": np.stack([GRID.patchify(image) for image in images]),
             "pixel_label": np.stack([GRID.patchify(label[..., None]) for label in labels]),
             "order": np.broadcast_to(np.arange(16, dtype=np.int32), (3, 16)), "valid": np.ones(3, np.float32)}
    return tiny_method(config), params, {MOMENTS: moments}, batch


def test_parameters_and_moments_are_those_of_the_module(given):
    method, params, extras, _ = given
    shapes = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
    for found, wanted in zip((params, extras), shapes, strict=True):
        found, wanted = flatten(found), flatten(wanted)
        assert {name: value.shape for name, value in found.items()} == {name: x.shape for name, x in wanted.items()}


def test_logits_and_loss_as_it_predicts_are_those_of_transformers(given, golden):
    method, params, extras, batch = given
    logits = np.asarray(jax.jit(method.pixel_logits)(params, extras, batch)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(logits, golden["eval/logits"], atol=3e-5 * np.abs(golden["eval/logits"]).max())
    loss, (metrics, same) = jax.jit(method.loss, static_argnums=5)(params, extras, batch, jax.random.key(0), 0, False)
    np.testing.assert_allclose(loss, golden["eval/loss"], rtol=1e-5)
    assert metrics["loss"][1] == (golden["labels"] < 255).sum()
    for found, before in zip(jax.tree.leaves(same), jax.tree.leaves(extras), strict=True):
        np.testing.assert_array_equal(found, before)


@pytest.mark.slow
def test_loss_gradients_and_running_moments_as_it_trains_are_those_of_transformers(given, golden):
    method, params, extras, batch = given
    compute = jax.jit(jax.value_and_grad(method.loss, has_aux=True), static_argnums=5)
    (loss, (_, after)), grads = compute(params, extras, batch, jax.random.key(0), 0, True)
    np.testing.assert_allclose(loss, golden["train/loss"], rtol=1e-5)
    theirs = under(golden, "weights/")
    wanted = from_hf({**{name: np.zeros_like(value) for name, value in theirs.items()},
                      **under(golden, "train/gradient/")})
    wanted, grads = flatten(wanted), flatten(grads)
    compared = [name for name, value in wanted.items() if value.any()]
    assert len(compared) == len(under(golden, "train/gradient/"))
    for name in compared:  # that of a bias before a batch norm is 0, but for rounding
        tolerance = max(1e-4 * np.abs(wanted[name]).max(), 1e-7)
        np.testing.assert_allclose(grads[name], wanted[name], atol=tolerance, err_msg=name)
    there = from_hf({**theirs, **under(golden, "train/moments/")})
    moments, after = flatten(there["extras"][MOMENTS]), flatten(after[MOMENTS])
    assert moments.keys() == after.keys()
    for name, value in moments.items():
        np.testing.assert_allclose(after[name], value, atol=2e-5 * np.abs(value).max(), err_msg=name)


@pytest.mark.slow
def test_images_that_do_not_count_change_neither_the_others_nor_the_moments(given):
    method, params, extras, batch = given
    compute = jax.jit(method.loss, static_argnums=5)
    more = {name: np.concatenate([value, value[:2]]) for name, value in batch.items()}
    more["patches"][3:] = 255 - more["patches"][3:]
    more["valid"][3:] = 0
    loss, (_, after) = compute(params, extras, batch, jax.random.key(0), 0, True)
    padded, (_, also) = compute(params, extras, more, jax.random.key(0), 0, True)
    np.testing.assert_allclose(padded, loss, rtol=1e-5)
    for name, value in flatten(after).items():
        np.testing.assert_allclose(flatten(also)[name], value, atol=1e-5 * float(jnp.abs(value).max()))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_doubling_lays_four_cells_for_each_and_its_gradient_gathers_them():
    x, kernel, bias = normal(0, 2, 3, 4, 5), normal(1, 5, 2, 2, 6), normal(2, 6)
    out, pull = jax.vjp(transposed, x, kernel, bias)
    for a in range(2):
        for b in range(2):
            np.testing.assert_allclose(out[:, a::2, b::2], x @ kernel[:, a, b] + bias, atol=1e-5)
    dy = normal(3, *out.shape)
    dx, dkernel, dbias = pull(dy)
    np.testing.assert_allclose(dbias, dy.sum((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(dx, sum(dy[:, a::2, b::2] @ kernel[:, a, b].T for a in range(2) for b in range(2)),
                               atol=1e-4)
    np.testing.assert_allclose(dkernel[:, 1, 0], np.einsum("byxc,byxf->cf", x, dy[:, 1::2, ::2]), atol=1e-4)


@pytest.mark.parametrize("side", [2, 4])
def test_pooling_takes_the_largest_of_each_whole_square(side):
    x = normal(0, 2, 9, 8, 3)
    found = np.asarray(greatest(jnp.asarray(x), side))
    assert found.shape == (2, 9 // side, 8 // side, 3)
    for i, j in np.ndindex(found.shape[1:3]):
        square = x[:, i * side:(i + 1) * side, j * side:(j + 1) * side]
        np.testing.assert_array_equal(found[:, i, j], square.max((1, 2)))
