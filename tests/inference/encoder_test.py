"""What an encoder gives for arrays is what evaluations compute of the same images; where it can be loaded from."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from mae_jax.commands.export.weights import export
from mae_jax.errors import UserError
from mae_jax.evals.context import pooled_features
from mae_jax.inference.encoder import open_encoder
from mae_jax.inference.foreign import fitted
from mae_jax.methods.base import Method
from mae_jax.ops.patches import MEAN, STD, normalize
from mae_jax.param_tree import flatten
from mae_jax.runtime.sharding import make_mesh
from mae_jax.storage import safetensors_file
from tests.helpers.stored import STEP, store_images, store_run
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_method, tiny_params, tiny_supervised

DRAWS = np.random.default_rng(0)
IMAGES = [DRAWS.integers(0, 256, (*size, 3), dtype=np.uint8) for size in DRAWS.integers(4, 60, (11, 2))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return store_run(tmp_path_factory.mktemp("runs") / "mae", tiny_config({"model.pool": "mean"}))


@pytest.fixture(scope="module")
def encoder(run):
    return open_encoder(str(run), batch_size=4)


def test_features_of_arrays_are_those_that_evaluations_compute(encoder):
    """Of the same batch bit for bit: through the same transform and the same function."""
    config, found = encoder.config, encoder(IMAGES[:4])
    patches = encoder.patches(IMAGES[:4])
    batch = {"patches": patches, "order": np.tile(np.arange(16, dtype=np.int32), (4, 1))}
    function = jax.jit(lambda *args: pooled_features(tiny_method(config), *args))
    np.testing.assert_array_equal(found, function(encoder.params, {}, batch))
    assert found.dtype == np.float32
    assert encoder.step == STEP


def test_the_size_of_a_batch_changes_no_more_than_rounding(encoder):
    whole = encoder(IMAGES)
    assert whole.shape == (11, 32)
    np.testing.assert_allclose(np.concatenate([encoder(IMAGES[:1]), encoder(IMAGES[1:3]), encoder(IMAGES[3:])]), whole,
                               atol=1e-5)
    assert encoder([]).shape == (0, 32)


def test_kinds_of_features(encoder):
    tokens = encoder(IMAGES[:2], "tokens")
    assert tokens.shape == (2, *encoder.shape("tokens")) == (2, 17, 32)
    np.testing.assert_array_equal(encoder(IMAGES[:2], "cls"), tokens[:, 0])
    np.testing.assert_allclose(encoder(IMAGES[:2], "mean"), tokens[:, 1:].mean(1), atol=1e-6)
    np.testing.assert_allclose(encoder(IMAGES[:2], "pool"), encoder(IMAGES[:2], "mean"), atol=1e-6)
    np.testing.assert_array_equal(encoder(IMAGES[:2], "patches"), tokens[:, 1:].reshape(2, 4, 4, 32))
    first = encoder(IMAGES[:2], "tokens", block=0)
    assert np.abs(first - tokens).max() > 0.01
    for wrong, line in (({"features": "patch"}, "did you mean 'patches'"), ({"block": 2}, "blocks 0 to 1"),
                        ({"block": 1.0}, "blocks 0 to 1"), ({"features": 3}, "features=3")):
        with pytest.raises(UserError, match=line):
            encoder(IMAGES[:2], **wrong)


@pytest.mark.parametrize("layout", ["mae_jax", "mae", "timm"])
def test_exports_give_the_same_features(run, encoder, layout, tmp_path, capsys):
    file = tmp_path / "weights.safetensors"
    export(str(run), str(file), layout)
    found = open_encoder(str(file), batch_size=4)
    np.testing.assert_allclose(found(IMAGES[:4], "tokens"), encoder(IMAGES[:4], "tokens"), atol=1e-6)
    assert found.step == -1


def test_weights_of_others_say_their_shape(run, encoder, tmp_path, caplog, capsys):
    """A file without our metadata: what nothing says is given, and its positions are adapted to another image size."""
    file = tmp_path / "theirs.safetensors"
    export(str(run), str(file), "mae")
    save_file(dict(flatten(safetensors_file.load(epath.Path(file)))), file)
    with pytest.raises(UserError, match="number of attention heads"):
        open_encoder(str(file))
    assert open_encoder(str(file), heads=2).image_size == (16, 16)  # by its positions
    found = open_encoder(str(file), batch_size=4, image_size=(32, 16), heads=2)
    assert found(IMAGES[:1], "patches").shape == (1, 8, 4, 32)
    found = open_encoder(str(file), batch_size=4, image_size=(16, 16), heads=2)
    np.testing.assert_allclose(found(IMAGES[:4], "cls"), encoder(IMAGES[:4], "cls"), atol=2e-2)  # another crop
    assert (found.image_size, found.of_run, found.config.model.depth) == ((16, 16), False, 2)
    with pytest.raises(UserError, match="batch_size=-1"):
        open_encoder(str(run), batch_size=-1)
    with pytest.raises(UserError, match="has its own image size"):
        open_encoder(str(run), image_size=(32, 32))


def test_another_normalization_is_taken_into_the_patch_embedding(run, tmp_path, capsys):
    """transformers' ViTs want pixels less 0.5, over 0.5: their preprocessor_config.json says so."""
    folder = tmp_path / "theirs"
    export(str(run), str(folder), "hf")
    said = {"image_mean": [0.5] * 3, "image_std": [0.5, 0.5, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    config = tiny_config()
    params = tiny_params(config)
    changed = fitted(str(folder), params, config)["encoder"]["patch_embed"]
    patches = tiny_batch(config)["patches"]
    pixels = (patches / 255 - 0.5) / np.tile([0.5, 0.5, 0.25], 16)
    wanted = pixels @ params["encoder"]["patch_embed"]["kernel"] + params["encoder"]["patch_embed"]["bias"]
    found = np.asarray(normalize(patches)) @ changed["kernel"] + changed["bias"]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": list(MEAN), "image_std": list(STD)}))
    assert fitted(str(folder), params, config)["encoder"]["patch_embed"] is params["encoder"]["patch_embed"]


def test_parameters_of_another_shape_are_refused_by_name(tmp_path):
    params = tiny_params(tiny_config({"model.depth": 1}))
    folder = store_run(tmp_path / "run", tiny_config(), params=params)
    with pytest.raises(UserError, match=r"encoder/block_01/\S+ is missing, and in the model .* has the shape"):
        open_encoder(str(folder))


@pytest.mark.parametrize(("path", "line"), [("", "not a workdir|no checkpoint"), ("run", "no single encoder")])
def test_what_has_no_encoder_is_refused(tmp_path, path, line):
    config = tiny_config({}, "moce")
    store_run(tmp_path / "run", config, params={"encoder": {"cls_token": np.zeros(3)}})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=line):
        open_encoder(str(tmp_path / (path or "empty")))


@pytest.mark.slow
def test_a_mixing_method_is_asked_in_raster_order(tmp_path):
    """Evaluations of MixedAE mix neighbors; features of images are those of each alone."""
    encoder = open_encoder(str(store_run(tmp_path / "run", tiny_config({}, "mixedae"))), batch_size=4)
    assert Method.patch_order(encoder.method).kind == "identity"
    np.testing.assert_allclose(encoder(IMAGES[:4])[1:2], encoder(IMAGES[1:2]), atol=1e-5)


def test_all_devices_share_a_batch(run):
    encoder = open_encoder(str(run))
    assert encoder.batch_size == 32 * jax.device_count()
    assert encoder.mesh.size == make_mesh(encoder.config).size


@pytest.mark.slow
def test_a_classifier_is_an_encoder_too(tmp_path):
    folder = store_images(tmp_path / "data")
    config = tiny_supervised({"data.source": "folder", "data.path": str(folder)})
    run = store_run(tmp_path / "run", config, ("a", "b", "c"))
    encoder = open_encoder(str(run), batch_size=4)
    assert encoder.classes == ("a", "b", "c")
    assert encoder(str(folder / "a" / "00.png")).shape == (1, 32)
