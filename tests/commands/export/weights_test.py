"""Exports are read back by us and by transformers."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from mae_jax.commands.export import weights
from mae_jax.errors import UserError
from mae_jax.param_tree import flatten
from mae_jax.storage.checkpoint import Checkpoints, load_params
from mae_jax.training import workdir
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_method, tiny_state, tiny_supervised


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with one checkpoint, and its parameters."""
    folder = tmp_path_factory.mktemp("export") / "run"
    config = tiny_config()
    state = tiny_state(config)
    params = {name: np.array(leaf) for name, leaf in flatten(state.params).items()}
    workdir.record(epath.Path(folder), config)
    checkpoints = Checkpoints(folder, 2)
    checkpoints.save(int(state.step), state)
    checkpoints.wait()
    checkpoints.close()
    return folder, params


def test_an_export_gives_back_every_parameter_bit_for_bit(run, tmp_path):
    folder, params = run
    file = tmp_path / "out.safetensors"
    assert weights.export(str(folder / "checkpoints" / "0"), str(file), "mae_jax") == 0
    loaded = flatten(load_params(file))
    assert loaded.keys() == params.keys()
    for name, value in loaded.items():
        np.testing.assert_array_equal(value, params[name])


def test_transformers_loads_the_hf_layout_without_a_missing_or_unexpected_name(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    weights.export(str(run[0]), str(tmp_path / "hf"), "hf")
    model, found = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(found.values())
    ours = run[1]["encoder/norm/scale"]
    np.testing.assert_array_equal(model.vit.layernorm.weight.detach().numpy(), ours)


@pytest.mark.parametrize(("size", "patch"), [((16, 24), (4, 4)), ((16, 16), (4, 8))])
def test_hugging_faces_layout_refuses_what_is_no_square_before_anything_is_written(tmp_path, size, patch):
    config = tiny_config({"data.image_size": size, "model.patch": patch})
    state = tiny_state(config)
    workdir.record(epath.Path(tmp_path / "run"), config)
    checkpoints = Checkpoints(tmp_path / "run", 2)
    checkpoints.save(int(state.step), state)
    checkpoints.wait()
    checkpoints.close()
    with pytest.raises(UserError, match=rf"{size[0]}x{size[1]} .* {patch[0]}x{patch[1]}, .*--layout=timm"):
        weights.export(str(tmp_path / "run"), str(tmp_path / "hf"), "hf")
    assert not (tmp_path / "hf").exists()
    assert weights.export(str(tmp_path / "run"), str(tmp_path / "out.safetensors"), "timm") == 0


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """A workdir with one checkpoint of a probe, its parameters and its batch norm's moments."""
    folder = tmp_path_factory.mktemp("export") / "probe"
    config = tiny_supervised({"method.head": "probe", "model.pool": "cls"})
    rng = np.random.default_rng(0)
    moments = {name: jnp.asarray(rng.uniform(1, 2, 32), jnp.float32) for name in ("mean", "var")}
    state = tiny_state(config, {"batch_norm": moments})
    params = jax.tree.map(np.array, state.params)
    workdir.record(epath.Path(folder), config)
    checkpoints = Checkpoints(folder, 2)
    checkpoints.save(int(state.step), state)
    checkpoints.wait()
    checkpoints.close()
    return folder, params, jax.tree.map(np.array, moments)


@pytest.mark.parametrize("layout", ["mae_jax", "timm", "mae"])
def test_the_batch_norm_of_a_probe_is_folded_into_its_head(probe, tmp_path, layout):
    folder, params, moments = probe
    file = tmp_path / "out.safetensors"
    weights.export(str(folder), str(file), layout)
    found = load_file(file)
    kernel = found["head/kernel"] if layout == "mae_jax" else found["head.weight"].T
    bias = found["head/bias" if layout == "mae_jax" else "head.bias"]
    assert not [name for name in found if "batch_norm" in name or name.startswith("extras")]
    features = np.random.default_rng(1).standard_normal((4, 32))
    normed = (features - moments["mean"]) / np.sqrt(moments["var"] + 1e-6)
    np.testing.assert_allclose(features @ kernel + bias, normed @ params["head"]["kernel"] + params["head"]["bias"],
                               atol=1e-5)


@pytest.mark.parametrize("layout", ["mae_jax", "timm"])
def test_the_file_of_a_classifier_says_its_classes(tmp_path, layout):
    config = tiny_supervised()
    state = tiny_state(config)
    workdir.record(epath.Path(tmp_path / "run"), config,
                   SimpleNamespace(num_train=9, classes=("ant", "bee", "cat"), identity=dict))
    checkpoints = Checkpoints(tmp_path / "run", 2)
    checkpoints.save(int(state.step), state)
    checkpoints.wait()
    checkpoints.close()
    weights.export(str(tmp_path / "run"), str(tmp_path / "out.safetensors"), layout)
    assert workdir.classes_of(str(tmp_path / "out.safetensors")) == ("ant", "bee", "cat")


def test_timms_layout_prints_the_arguments_of_its_model(probe, tmp_path, capsys):
    weights.export(str(probe[0]), str(tmp_path / "out.safetensors"), "timm")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == ("VisionTransformer(img_size=(16, 16), patch_size=(4, 4), embed_dim=32, depth=2, num_heads=2, "
                    "mlp_ratio=4, num_classes=3, global_pool='token', fc_norm=False)")


def test_timms_layout_of_a_masked_autoencoder_is_its_encoder(run, tmp_path, capsys):
    weights.export(str(run[0]), str(tmp_path / "out.safetensors"), "timm")
    found = load_file(tmp_path / "out.safetensors")
    assert "num_classes=0" in capsys.readouterr().out
    assert len(found) == 2 + 2 + 2 * 12 + 2
    assert not [name for name in found if "decoder" in name or "mask_token" in name]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["segment", "beit", "splitmask", "dino"])
def test_what_heads_and_decoders_of_other_methods_predict_is_not_written_as_a_classifier(method, tmp_path, capsys):
    config = tiny_config(method=method)
    some = tiny_method(config)
    params, extras = some.init(jax.random.key(0), tiny_batch(config))
    extras |= {"teacher": jax.tree.map(lambda x: x + 1, params)} if method == "dino" else {}
    state = tiny_state(config, extras, some)
    workdir.record(epath.Path(tmp_path / "run"), config)
    checkpoints = Checkpoints(tmp_path / "run", 2)
    checkpoints.save(int(state.step), state)
    checkpoints.wait()
    checkpoints.close()
    weights.export(str(tmp_path / "run"), str(tmp_path / "out.safetensors"), "timm")
    found = load_file(tmp_path / "out.safetensors")
    assert not [name for name in found if name.startswith(("head", "decoder", "mask_token"))]
    assert "num_classes=0" in capsys.readouterr().out
    source = extras["teacher"] if method == "dino" else jax.device_get(state.params)
    np.testing.assert_array_equal(found["norm.weight"], source["encoder"]["norm"]["scale"])
    if config.model.layer_scale:
        with pytest.raises(UserError, match=r"LayerScale.*--layout=timm"):
            weights.export(str(tmp_path / "run"), str(tmp_path / "hf"), "hf")
    else:
        weights.export(str(tmp_path / "run"), str(tmp_path / "hf"), "hf")
        assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["ViTModel"]


@pytest.mark.parametrize(("name", "layout", "words"), [
    ("x.pth", "mae_jax", r"x\.pth: .*\.safetensors"), ("x.bin", "hf", r"x\.bin: .*writes a folder"),
    ("x.pt", "timm", r"x\.pt: .*\.safetensors"), ("x.safetensors", "hf", "--layout=hf writes a folder"),
    ("folder.safetensors", "mae_jax", "a folder has this name")])
def test_a_name_that_is_not_of_what_is_written_is_refused(run, tmp_path, name, layout, words):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match=words):
        weights.export(str(run[0]), str(tmp_path / name), layout)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]


def test_a_file_that_is_there_is_replaced_and_told_and_a_run_is_never_written_into(run, tmp_path, capsys):
    file = tmp_path / "out.safetensors"
    weights.export(str(run[0]), str(file), "mae_jax")
    assert "replaces" not in capsys.readouterr().out
    weights.export(str(run[0]), str(file), "mae_jax")
    assert "replaces" in capsys.readouterr().out
    before = (run[0] / "config.json").read_bytes()
    with pytest.raises(UserError, match=f"--to={run[0]} is the workdir"):
        weights.export(str(run[0]), str(run[0]), "hf")
    assert (run[0] / "config.json").read_bytes() == before


def test_a_name_without_the_suffix_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"\.safetensors"):
        weights.export(str(run[0]), str(tmp_path / "out.bin"), "timm")


@pytest.mark.parametrize("name", ["out.safetensor", "out.safetensros"])
def test_a_misspelt_file_is_not_taken_for_a_folder(tmp_path, run, name):
    with pytest.raises(UserError, match=r"\.safetensors\?"):
        weights.export(str(run[0]), str(tmp_path / name), "mae_jax")
