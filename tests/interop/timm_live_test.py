"""Parity with timm's models of published size, computed here and now where torch and timm are installed."""

import jax
import numpy as np
import pytest

from mae_jax.config import default, vit
from mae_jax.interop.mae import from_mae
from mae_jax.interop.timm import folded, timm_arguments, to_timm
from mae_jax.ops.patches import PatchGrid
from mae_jax.param_tree import flatten
from tests.helpers.tiny import tiny_method
from tests.interop.parity_test import cut

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

TOLERANCE = 1e-5  # of the largest logit
CASES = {
    "deit3_small_patch16_224": ("S", {"pool": "cls", "layer_scale": 1e-4, "positions": "learned"}, "linear"),
    "deit3_base_patch16_224": ("B", {"pool": "cls", "layer_scale": 1e-4, "positions": "learned"}, "linear"),
    "vit_small_patch16_224": ("S", {"pool": "mean", "positions": "learned"}, "linear"),
    "vit_base_patch16_224": ("B", {"pool": "mean", "positions": "fixed"}, "linear"),
    "vit_base_patch16_224.probe": ("B", {"pool": "cls", "positions": "fixed"}, "probe"),
    "vit_small_patch16_224.mean_probe": ("S", {"pool": "mean", "gelu": "tanh"}, "probe"),
}
PICTURES = 2


def make_config(size, model, head):
    config = default("supervised")
    config.batch_size = PICTURES
    config.model.update(**vit(size, 16), dtype="float32", **model)
    config.method.update(classes=1000, head=head)
    return config


def random_state(config):
    """Random weights that keep the scale of tokens; norm scales and LayerScale lie around one."""
    method, rng = tiny_method(config), np.random.default_rng(0)

    def draw(leaf):
        scale = leaf.shape[0] ** -0.5 if len(leaf.shape) == 2 else 0.3
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    params, extras = jax.tree.map(draw, jax.eval_shape(method.init, jax.random.key(0), method.batch_spec()))
    params = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: leaf + (keys[-1].key in ("scale", "gamma")), params)
    return params, {"batch_norm": {"mean": extras["batch_norm"]["mean"], "var": 1 + extras["batch_norm"]["var"] ** 2}
                    } if extras else {}


@pytest.mark.parametrize("name", CASES)
def test_exported_weights_give_timm_the_same_logits(name):
    config = make_config(*CASES[name])
    params, extras = random_state(config)
    pictures = np.random.default_rng(1).integers(0, 256, (PICTURES, 224, 224, 3), np.uint8)
    arguments = timm_arguments(config, 1000)
    model = timm.create_model(name.partition(".")[0], **arguments).eval()
    state = to_timm(folded(params, extras), PatchGrid.of(config).shape, config.model.patch)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=True)
    pixels = (pictures / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        wanted = model(torch.from_numpy(pixels).float().permute(0, 3, 1, 2)).numpy()
    patches = cut(pictures, 16)
    batch = {"patches": patches, "order": np.tile(np.arange(196, dtype=np.int32), (PICTURES, 1))}
    found = jax.jit(tiny_method(config).logits)(params, extras, batch)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


def test_images_and_patches_that_are_no_squares_give_timm_the_same_logits():
    config = make_config("S", {"pool": "cls"}, "linear")
    config.data.image_size, config.model.patch, config.model.depth = (32, 48), (16, 8), 2
    params, _ = random_state(config)
    model = timm.models.VisionTransformer(**timm_arguments(config, 1000)).eval()
    state = to_timm(params, PatchGrid.of(config).shape, config.model.patch)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=True)
    pixels = np.random.default_rng(1).integers(0, 256, (PICTURES, 32, 48, 3), np.uint8)
    normalized = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        wanted = model(torch.from_numpy(normalized).float().permute(0, 3, 1, 2)).numpy()
    patches = pixels.reshape(PICTURES, 2, 16, 6, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(PICTURES, 12, -1)
    batch = {"patches": patches, "order": np.tile(np.arange(12, dtype=np.int32), (PICTURES, 1))}
    found = jax.jit(tiny_method(config).logits)(params, {}, batch)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_small_patch16_224"])
def test_timms_own_state_is_read_with_the_shapes_of_our_model(name):
    config = make_config(*CASES[name])
    model = timm.create_model(name, global_pool=timm_arguments(config, 1000)["global_pool"])
    read = from_mae({key: value.numpy() for key, value in model.state_dict().items()})
    shapes = {key: leaf.shape for key, leaf in flatten(random_state(config)[0]).items()}
    assert {key: leaf.shape for key, leaf in flatten(read).items()} == shapes
