"""`init_from` a file or folder of another library: told by its content, whatever wraps its names."""

import json

import ml_dtypes
import numpy as np
import pytest

from mae_jax.errors import UserError
from mae_jax.interop.hf import to_hf
from mae_jax.interop.mae import to_mae
from mae_jax.param_tree import flatten
from tests.helpers.tiny import tiny_config, tiny_params, tiny_supervised
from tests.helpers.torch_files import Global, legacy, zipped
from tests.training.warm_start_test import started


@pytest.fixture(scope="module")
def params():
    """Random parameters of a tiny MAE, flat."""
    return tiny_params(tiny_config(), seed=3)


@pytest.fixture(scope="module")
def grid_and_patch():
    config = tiny_config()
    height, width = config.data.image_size
    rows, columns = config.model.patch
    return (height // rows, width // columns), (rows, columns)


@pytest.fixture(scope="module")
def published(params, grid_and_patch):
    """The state dict of the published MAE code."""
    return to_mae(params, *grid_and_patch)


def safetensor(state) -> bytes:
    """Returns a file of safetensors, by its format's description: NumPy's writer knows no bfloat16."""
    kinds, header, data = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}, {}, b""
    for name, array in state.items():
        content = array.tobytes()
        header[name] = {"dtype": kinds[array.dtype.name], "shape": array.shape,
                        "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def check(source, params, atol=0.0, config=None):
    """Compares the encoder of a model that starts from a source."""
    ours, report = started(str(source), config or tiny_config())
    for name, leaf in flatten(params).items():
        if name in ours and name.startswith("encoder/") and "/norm/" not in name:
            np.testing.assert_allclose(ours[name], leaf, atol=atol, err_msg=name)
    return report


@pytest.mark.parametrize("way", [zipped, legacy])
@pytest.mark.parametrize("name", ["mae_pretrain_vit.pth", "model.pt", "weights.bin", "noending"])
def test_a_checkpoint_of_the_published_code_is_read_whatever_its_name(tmp_path, params, published, way, name):
    args = Global("argparse", "Namespace", ())
    (tmp_path / name).write_bytes(way({"model": published, "args": args, "epoch": 799}))
    check(tmp_path / name, params)


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "encoder.", "teacher.backbone.", "module.model.",
                                    "_orig_mod."])
def test_what_all_names_begin_with_does_not_count_and_what_lies_beside_is_told(tmp_path, params, published, prefix,
                                                                              caplog):
    caplog.set_level("INFO")
    encoder = {f"{prefix}{key}": value for key, value in published.items() if not key.startswith(("decoder", "mask"))}
    beside = {"head.mlp.0.weight": np.ones((3, 3), np.float32), "queue": np.ones(2, np.float32)}
    (tmp_path / "a.pth").write_bytes(zipped({"state_dict": encoder | beside}))
    check(tmp_path / "a.pth", params)
    assert f"begin with {prefix!r}" in caplog.text
    assert "left over are head.mlp.0.weight, queue" in caplog.text
    assert "reading its state dict 'state_dict'" in caplog.text


def test_of_moco_v3_the_encoder_is_taken_and_heads_and_momentum_encoder_are_told(tmp_path, params, published, caplog):
    caplog.set_level("INFO")
    encoder = {key: value for key, value in published.items() if not key.startswith(("decoder", "mask"))}
    state = {f"module.base_encoder.{key}": value for key, value in encoder.items()}
    state |= {f"module.momentum_encoder.{key}": np.zeros_like(value) for key, value in encoder.items()}
    state |= {f"module.{name}": np.ones((4, 4), np.float32) for name in (
        "base_encoder.head.0.weight", "base_encoder.head.1.running_mean", "base_encoder.head.6.weight",
        "predictor.0.weight")}
    (tmp_path / "a.pth").write_bytes(zipped({"state_dict": state}))
    ours, report = started(str(tmp_path / "a.pth"), tiny_supervised({"model.pool": "cls"}))
    np.testing.assert_array_equal(ours["encoder/block_01/attn/qkv/kernel"],
                                  flatten(params)["encoder/block_01/attn/qkv/kernel"])
    assert "left over are module.base_encoder.head.0.weight" in caplog.text
    assert "left over: none" in report


def test_the_teacher_of_dinos_code_is_taken(tmp_path, params, published):
    encoder = {key: value for key, value in published.items() if not key.startswith(("decoder", "mask"))}
    student = {f"module.backbone.{key}": np.zeros_like(value) for key, value in encoder.items()}
    teacher = {f"backbone.{key}": value for key, value in encoder.items()}
    (tmp_path / "a.pth").write_bytes(zipped({"student": student, "teacher": teacher, "epoch": 99}))
    check(tmp_path / "a.pth", params)


def test_biases_and_mask_token_of_beits_code_are_taken_and_relative_positions_refused(tmp_path, params, published):
    state = {key: value for key, value in published.items() if not key.startswith(("decoder", "mask"))}
    wanted = {}
    for key in [key for key in state if key.endswith("qkv.bias")]:
        query, _, value = np.split(state.pop(key), 3)
        stem = key.removesuffix("qkv.bias")
        state |= {f"{stem}q_bias": query, f"{stem}v_bias": value}
        wanted[f"encoder/block_{int(key.split('.')[1]):02d}/attn/qkv/bias"] = np.concatenate(
            [query, np.zeros_like(query), value])
    state |= {"mask_token": np.ones((1, 1, 8), np.float32), "lm_head.weight": np.ones((5, 8), np.float32)}
    (tmp_path / "a.pth").write_bytes(zipped({"model": state}))
    ours, _ = started(str(tmp_path / "a.pth"), tiny_config())
    for name, bias in wanted.items():
        np.testing.assert_array_equal(ours[name], bias)
    state["rel_pos_bias.relative_position_bias_table"] = np.ones((9, 2), np.float32)
    (tmp_path / "a.pth").write_bytes(zipped({"model": state}))
    with pytest.raises(UserError, match="relative_position_bias_table"):
        started(str(tmp_path / "a.pth"), tiny_config())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read(tmp_path, params, published, dtype):
    halves = {key: value.astype(dtype) for key, value in published.items() if not key.startswith(("decoder", "mask"))}
    (tmp_path / "a.safetensors").write_bytes(safetensor(halves))
    check(tmp_path / "a.safetensors", params, atol=0.02)
    (tmp_path / "a.pth").write_bytes(zipped(halves))
    check(tmp_path / "a.pth", params, atol=0.02)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_folder_of_transformers_is_read_whole_or_in_parts(tmp_path, params, grid_and_patch, kind, parts):
    state = to_hf(params, *grid_and_patch)
    write = safetensor if kind.endswith("safetensors") else zipped
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit_mae", "hidden_size": 8}))
    stem, _, ending = kind.rpartition(".")
    if parts == 1:
        (tmp_path / kind).write_bytes(write(state))
    else:
        files = [f"{stem}-{i + 1:05d}-of-00003.{ending}" for i in range(parts)]
        where = {name: files[i % parts] for i, name in enumerate(state)}
        for file in files:
            (tmp_path / file).write_bytes(write({name: state[name] for name in state if where[name] == file}))
        (tmp_path / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    check(tmp_path, params)


def test_an_index_of_parts_that_lack_something_or_lie_elsewhere_is_refused(tmp_path, params, grid_and_patch):
    state = to_hf(params, *grid_and_patch)
    (tmp_path / "a.safetensors").write_bytes(safetensor(state))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*state, "more"], "a.safetensors")}))
    with pytest.raises(UserError, match=r"index\.json .*more"):
        started(str(tmp_path), tiny_config())
    for where in ("../a.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {"vit.embeddings.cls_token": where}}))
        with pytest.raises(UserError, match=r"index\.json .*weight_map"):
            started(str(tmp_path), tiny_config())


def test_a_classifier_of_transformers_gives_its_head_and_no_pooler(tmp_path, params, grid_and_patch):
    encoder = {key: value for key, value in to_hf(params, *grid_and_patch).items() if key.startswith("vit.")}
    config = tiny_supervised({"model.pool": "cls"})
    width, classes = config.model.width, tiny_params(config)["head"]["bias"].shape[0]
    head = {"classifier.weight": np.arange(classes * width, dtype=np.float32).reshape(classes, width),
            "classifier.bias": np.arange(classes, dtype=np.float32)}
    pooler = {"vit.pooler.dense.weight": np.ones((width, width), np.float32)}
    (tmp_path / "model.safetensors").write_bytes(safetensor(encoder | head | pooler))
    ours, _ = started(str(tmp_path), config)
    np.testing.assert_array_equal(ours["head/kernel"], head["classifier.weight"].T)
    np.testing.assert_array_equal(ours["head/bias"], head["classifier.bias"])


def test_newer_names_of_the_decoder_are_those_of_the_older(tmp_path, params, grid_and_patch):
    state = {key.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer."): value
             for key, value in to_hf(params, *grid_and_patch).items()}
    (tmp_path / "model.safetensors").write_bytes(safetensor(state))
    ours, _ = started(str(tmp_path), tiny_config())
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(ours[name], leaf, err_msg=name)


def test_a_hostile_file_is_one_line(tmp_path):
    (tmp_path / "a.pth").write_bytes(zipped({"model": Global("os", "system", ("true",))}))
    with pytest.raises(UserError, match=r"a\.pth is not read: .*os\.system"):
        started(str(tmp_path / "a.pth"), tiny_config())


@pytest.mark.parametrize(("said", "says"), [
    ({"num_attention_heads": 16}, "16 where this config has model.heads=2"), ({"hidden_act": "relu"}, "model.gelu"),
    ({"patch_size": 32}, "model.patch")])
def test_what_shapes_do_not_show_is_compared_with_the_config_beside_the_weights(tmp_path, params, grid_and_patch, said,
                                                                              says):
    (tmp_path / "model.safetensors").write_bytes(safetensor(to_hf(params, *grid_and_patch)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit_mae", **said}))
    with pytest.raises(UserError, match=says):
        started(str(tmp_path), tiny_config())


def test_a_head_of_other_classes_by_the_config_beside_it_is_not_taken(tmp_path, params, grid_and_patch):
    encoder = {key: value for key, value in to_hf(params, *grid_and_patch).items() if key.startswith("vit.")}
    config = tiny_supervised({"model.pool": "cls"})
    head = {"classifier.weight": np.ones((3, config.model.width), np.float32),
            "classifier.bias": np.full(3, 7, np.float32)}
    (tmp_path / "model.safetensors").write_bytes(safetensor(encoder | head))
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "zebra", "1": "yak", "2": "xerus"}}))
    ours, _ = started(str(tmp_path), config, ("cat", "dog", "eel"))
    assert (ours["head/bias"] != 7).all()
    ours, _ = started(str(tmp_path), config, ("zebra", "yak", "xerus"))
    assert (ours["head/bias"] == 7).all()


def test_a_header_whose_size_begins_as_torchs_files_do_is_still_of_safetensors(tmp_path, params, published):
    content = safetensor(published)
    header = content[8:8 + int.from_bytes(content[:8], "little")]
    longer = header + b" " * ((0x80 - len(header)) % 256)
    (tmp_path / "a.safetensors").write_bytes(len(longer).to_bytes(8, "little") + longer + content[8 + len(header):])
    assert (tmp_path / "a.safetensors").read_bytes()[0] == 0x80
    check(tmp_path / "a.safetensors", params)
