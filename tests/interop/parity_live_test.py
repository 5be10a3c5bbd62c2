"""Parity with Hugging Face's ViTMAE, computed here and now where torch and transformers are installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mae_jax.config import default
from mae_jax.interop.hf import LAYOUT, from_hf, to_hf
from mae_jax.ops.patches import PatchGrid
from mae_jax.param_tree import flatten
from mae_jax.storage import safetensors_file
from tests.helpers.tiny import tiny_method

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # of the largest absolute value of each tensor


def hugging_face(config, params, folder):
    """Writes the folder that `export --layout=hf` writes, and loads it as a user does; no weight is left random."""
    state = to_hf(params, PatchGrid.of(config).shape, config.model.patch)
    safetensors_file.save(epath.Path(folder) / "model.safetensors", state, {"format": "pt"})
    for name, text in LAYOUT.beside(config).items():
        (folder / name).write_text(text)
    model, found = transformers.ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    loaded = flatten(from_hf({key: value.numpy() for key, value in model.state_dict().items()}))
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(loaded[name], leaf, err_msg=name)
    return model.eval()


def small(config):
    config.data.image_size = (24, 24)
    config.model.update(width=48, depth=3, heads=4, patch=(4, 4))
    config.method.update(target="pixel", decoder_width=32, decoder_depth=2, decoder_heads=2, mask_ratio=0.6)


@pytest.mark.parametrize("shrink", [None, small], ids=["vit_b_16", "small"])
def test_exported_weights_give_hugging_face_the_same_loss_and_predictions(shrink, tmp_path):
    config = default()
    config.batch_size = 2
    config.model.dtype = "float32"
    if shrink:
        shrink(config)
    method = tiny_method(config)
    rng = np.random.default_rng(0)
    shapes, _ = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
    params = jax.tree.map(lambda s: 0.05 * rng.standard_normal(s.shape, np.float32), shapes)
    spec = method.batch_spec()["patches"].shape
    raster = rng.integers(0, 256, spec, np.uint8)
    order = rng.permuted(np.tile(np.arange(spec[1], dtype=np.int32), (2, 1)), axis=1)
    batch = {"patches": np.take_along_axis(raster, order[..., None], 1), "order": order, "valid": np.ones(2)}

    @jax.jit
    def ours(params):
        return method.loss(params, {}, batch, jax.random.key(0), jnp.int32(0), True)[0], method.predict(params, batch)

    height, width = PatchGrid.of(config).shape
    patch = config.model.patch[0]
    pictures = raster.reshape(2, height, width, patch, patch, 3).transpose(0, 5, 1, 3, 2, 4)
    pixels = pictures.reshape(2, 3, height * patch, width * patch) / 255
    pixels = (pixels - np.reshape([0.485, 0.456, 0.406], (3, 1, 1))) / np.reshape([0.229, 0.224, 0.225], (3, 1, 1))
    with torch.no_grad():
        theirs = hugging_face(config, params, tmp_path)(torch.from_numpy(pixels).float(),
                                              noise=torch.from_numpy(np.argsort(order).astype(np.float32)))
    loss, predictions = jax.device_get(ours(params))
    expected = np.take_along_axis(theirs.logits.numpy(), order[:, method.num_visible:, None], 1)
    np.testing.assert_allclose(loss, theirs.loss.numpy(), rtol=TOLERANCE)
    np.testing.assert_allclose(predictions, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize(("size", "patch"), [((24, 32), (4, 4)), ((16, 64), (8, 8)), ((24, 24), (4, 8))])
def test_what_is_refused_since_it_is_no_square_would_fail_there(size, patch, tmp_path):
    config = default()
    small(config)
    config.data.image_size, config.model.patch, config.batch_size = size, patch, 2
    assert "--layout=timm" in LAYOUT.refuses(config)
    method = tiny_method(config)
    shapes, _ = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
    with pytest.raises((RuntimeError, TypeError, ValueError)), torch.no_grad():
        hugging_face(config, jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes), tmp_path)(
            torch.zeros(2, 3, *size))
