"""MAE as published, in raster order: gather the visible patches, encode, append mask tokens, unshuffle, decode all.

`mae_jax` does none of this on the device: the host permutes and the device slices. The two must agree. The reference
below is NumPy in float64; with xp=jnp the same lines give its gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mae_jax.config import default
from mae_jax.data.masking import draw
from mae_jax.param_tree import flatten
from tests.helpers.tiny import tiny_method

TOLERANCE = 1e-5  # of the largest absolute value of each tensor
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x):
    centered = x - x.mean(-1, keepdims=True)
    return centered / (x.var(-1, keepdims=True) + 1e-6) ** 0.5 * p["scale"] + p["bias"]


def attention(p, x, heads, xp):
    images, tokens, width = x.shape
    q, k, v = linear(p["qkv"], x).reshape(images, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(-1, -2) / (width // heads) ** 0.5
    weights = xp.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    return linear(p["proj"], mixed.transpose(0, 2, 1, 3).reshape(x.shape))


def blocks(params, x, heads, xp):
    erf = scipy.special.erf if xp is np else jax.scipy.special.erf
    for name in sorted(name for name in params if name.startswith("block_")):
        p = params[name]
        x = x + attention(p["attn"], norm(p["norm1"], x), heads, xp)
        hidden = linear(p["mlp"]["fc1"], norm(p["norm2"], x))
        x = x + linear(p["mlp"]["fc2"], hidden * 0.5 * (1 + erf(hidden / 2**0.5)))
    return norm(params["norm"], x)


def positions(grid, width):
    """[N, width], one number at a time: a quarter each of sin x, cos x, sin y, cos y."""
    quarter = width // 4
    table = np.zeros((*grid, width))
    for y in range(grid[0]):
        for x in range(grid[1]):
            for k in range(quarter):
                omega = 10000 ** (-k / quarter)
                table[y, x, k::quarter] = np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)
    return table.reshape(-1, width)


def reference(params, raster, order, config, xp=np):
    """Returns (loss, predictions [B, N, P] in raster order) for uint8 patches [B, N, P] in raster order."""
    grid = [side // patch for side, patch in zip(config.data.image_size, config.model.patch, strict=True)]
    images, patches, values = raster.shape
    visible = int(patches * (1 - config.method.mask_ratio))
    restore = np.argsort(order, axis=1)
    pixels = ((raster.reshape(images, patches, -1, 3) / 255 - MEAN) / STD).reshape(raster.shape)

    encoder, decoder = params["encoder"], params["decoder"]
    x = linear(encoder["patch_embed"], pixels) + positions(grid, config.model.width)
    x = xp.take_along_axis(x, order[:, :visible, None], 1)
    x = xp.concatenate([xp.repeat(encoder["cls_token"], images, 0), x], 1)
    x = linear(decoder["embed"], blocks(encoder, x, config.model.heads, xp))
    masks = xp.tile(decoder["mask_token"], (images, patches - visible, 1))
    x = xp.concatenate([x[:, :1], xp.take_along_axis(xp.concatenate([x[:, 1:], masks], 1), restore[..., None], 1)], 1)
    x = x + np.pad(positions(grid, config.method.decoder_width), ((1, 0), (0, 0)))
    predictions = linear(decoder["head"], blocks(decoder, x, config.method.decoder_heads, xp))[:, 1:]

    if config.method.target == "norm_pix":
        variance = ((pixels - pixels.mean(-1, keepdims=True)) ** 2).sum(-1, keepdims=True) / (values - 1)
        pixels = (pixels - pixels.mean(-1, keepdims=True)) / (variance + 1e-6) ** 0.5
    mask = np.take_along_axis(np.arange(patches)[None].repeat(images, 0) >= visible, restore, 1)
    return (((predictions - pixels) ** 2).mean(-1) * mask).sum() / mask.sum(), predictions


@pytest.fixture(scope="module", params=[
    pytest.param(("random", 0.75, "norm_pix"), id="random"),
    pytest.param(("block", 0.5, "pixel"), id="block", marks=pytest.mark.slow),
    pytest.param(("grid", 0.75, "pixel"), id="grid", marks=pytest.mark.slow)])
def problem(request):
    """(method, random float32 parameters, raster patches, orders) for images that are not square."""
    masking, mask_ratio, target = request.param
    config = default()
    config.batch_size = 3
    config.data.image_size = (24, 32)
    config.model.update(width=16, depth=1, heads=2, patch=(4, 4), dtype="float32")
    config.method.update(decoder_width=24, decoder_depth=1, decoder_heads=3, mask_ratio=mask_ratio, masking=masking,
                         target=target)
    method = tiny_method(config)
    rng = np.random.default_rng(0)
    shapes, _ = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
    params = jax.tree.map(lambda s: np.float32(rng.standard_normal(s.shape) / max(s.shape[0], 9) ** 0.5), shapes)
    raster = rng.integers(0, 256, (3, 48, 48), np.uint8)
    return method, params, raster, np.stack([draw(method.patch_order(), rng)["order"] for _ in range(3)])


def batch(raster, order):
    patches = np.take_along_axis(raster, order[..., None], 1)
    return {"patches": patches, "order": order, "valid": np.ones(len(order), np.float32)}


def loss(method, raster, order):
    return lambda params: method.loss(params, {}, batch(raster, order), jax.random.key(0), jnp.int32(0), True)[0]


def assert_close(ours, expected, name=""):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max(), err_msg=name)


def test_loss_and_predictions_are_those_of_gather_and_unshuffle(problem):
    method, params, raster, order = problem
    expected, predictions = reference(jax.tree.map(np.float64, params), raster, order, method.config)
    assert_close(jax.jit(loss(method, raster, order))(params), expected)
    hidden = np.take_along_axis(predictions, order[:, method.num_visible:, None], 1)
    assert_close(jax.jit(method.predict)(params, batch(raster, order)), hidden)


def test_gradients_are_those_of_gather_and_unshuffle(problem):
    method, params, raster, order = problem
    ours = flatten(jax.jit(jax.grad(loss(method, raster, order)))(params))
    with jax.enable_x64(True):
        exact = jax.grad(lambda p: reference(p, raster, order, method.config, jnp)[0])
        expected = flatten(jax.jit(exact)(jax.tree.map(np.float64, params)))
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(ours[name], gradient, name)


def test_the_order_of_the_hidden_patches_changes_nothing(problem):
    method, params, raster, order = problem
    other = order.copy()
    other[:, method.num_visible:] = other[:, method.num_visible:][:, ::-1]
    assert_close(jax.jit(loss(method, raster, other))(params), jax.jit(loss(method, raster, order))(params))
