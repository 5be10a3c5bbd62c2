"""The same weights, images and visible sets as Hugging Face's ViTMAE: golden/make_vitmae.py wrote its results."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.config import default
from mae_jax.interop.hf import from_hf, to_hf
from mae_jax.ops.patches import PatchGrid
from tests.helpers.tiers import all_slow_but
from tests.helpers.tiny import tiny_method
from tests.interop.layouts_test import NEWER

TOLERANCE = 1e-5  # of the largest absolute value of each tensor
CASES = {"square": (0.75, "norm_pix"), "wide": (0.6, "pixel")}


def cut(pictures, patch):
    """Pictures [B, height, width, 3] to patches [B, N, P] in raster order, channel fastest."""
    images, height, width, _ = pictures.shape
    tiles = pictures.reshape(images, height // patch, patch, width // patch, patch, 3)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(images, -1, patch * patch * 3)


def older(name):
    """Returns what transformers 4 calls a parameter; the file was written with version 5."""
    for before, now in NEWER.items():
        name = name.replace(now, before)
    return name


@pytest.fixture(scope="module", params=all_slow_but((("square", "unrolled"),),
                                                    itertools.product(CASES, ("unrolled", "scanned"))), ids="-".join)
def both(request):
    """(what the file holds, what we compute), each a dict of loss, predictions and gradients."""
    name, layers = request.param
    with np.load(Path(__file__).parents[1] / "golden" / "vitmae.npz") as file:
        arrays = dict(file)
    weights = {key.removeprefix("weight/"): value for key, value in arrays.items() if key.startswith("weight/")}
    golden = {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}
    golden = {older(key): value for key, value in golden.items()}
    config = default()
    config.batch_size = len(golden["pictures"])
    config.data.image_size = golden["pictures"].shape[1:3]
    config.model.update(width=24, depth=2, heads=3, patch=(8, 8), scan=layers == "scanned", dtype="float32")
    mask_ratio, target = CASES[name]
    config.method.update(decoder_width=16, decoder_depth=1, decoder_heads=2, mask_ratio=mask_ratio, target=target)
    method = tiny_method(config)
    patches = np.take_along_axis(cut(golden["pictures"], 8), golden["order"][..., None], 1)
    batch = {"patches": patches, "order": golden["order"], "valid": np.ones(len(patches), np.float32)}

    def loss(params):
        value, _ = method.loss(params, {}, batch, jax.random.key(0), jnp.zeros((), jnp.int32), True)
        return value, method.predict(params, batch)

    (value, predictions), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(from_hf(weights))
    # A gradient moves as its weight does.
    ours = to_hf(jax.device_get(gradients), PatchGrid.of(config).shape, config.model.patch)
    return golden, {"loss": value, "predictions": predictions,
                    **{f"gradient/{key}": ours[key] for key in map(older, weights)}}


@pytest.mark.parametrize("name", ["loss", "predictions"])
def test_the_loss_and_the_predictions_are_those_of_hugging_face(both, name):
    golden, ours = both
    np.testing.assert_allclose(ours[name], golden[name], rtol=0, atol=TOLERANCE * np.abs(golden[name]).max())


def test_every_gradient_is_that_of_hugging_face(both):
    golden, ours = both
    names = [name for name in golden if name.startswith("gradient/")]
    assert len(names) == 3 + 3 * 16 + 2 + 2 + 1 + 2 + 2
    for name in names:
        # A constant added to all logits of a query does nothing, so the key bias has no gradient: rounding alone.
        scale = 1 if name.endswith("key.bias") else np.abs(golden[name]).max()
        np.testing.assert_allclose(ours[name], golden[name], rtol=0, atol=TOLERANCE * scale, err_msg=name)
