"""UperNet in the names of transformers and of mmsegmentation, in and out (`check_exports.py` loads it there)."""

from pathlib import Path

import numpy as np
import pytest

from mae_jax.commands.export import weights
from mae_jax.errors import UserError
from mae_jax.interop import hf, layouts, upernet
from mae_jax.interop.upernet import from_hf, from_mmseg, to_hf, to_mmseg
from mae_jax.param_tree import flatten
from tests.helpers.tiny import tiny_segment

FIELDS = {
    "data.image_size": (64, 64), "model.patch": (16, 16), "model.width": 16, "model.depth": 4, "model.heads": 2,
    "model.positions": "learned", "model.layer_scale": 0.1, "method.classes": 5, "method.head": "upernet",
    "method.blocks": "0,1,2,3", "method.relative_position_bias": True, "method.head_width": 12, "method.aux_width": 8}


@pytest.fixture(scope="module")
def state():
    """The state dict of transformers' module, of random numbers."""
    with np.load(Path(__file__).parents[1] / "golden" / "upernet.npz") as file:
        return {name.removeprefix("weights/"): file[name] for name in file.files if name.startswith("weights/")}


def in_mmseg(state):
    """Returns a state dict of transformers by mmsegmentation's names, which are written out here a second time."""
    renamed = {}
    layer = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.output.dense": "attn.proj",
             "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "lambda_1": "gamma_1", "lambda_2": "gamma_2",
             "attention.attention.relative_position_bias.relative_position_bias_table":
             "attn.relative_position_bias_table"}
    for key, value in state.items():
        name = key.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("embeddings.cls_token", "cls_token").replace("embeddings.position_embeddings", "pos_embed")
        name = name.replace("batch_norm", "bn").replace("head.classifier", "head.conv_seg")
        if name.startswith("backbone.encoder.layer."):
            number, rest = name.removeprefix("backbone.encoder.layer.").split(".", 1)
            if ".query." in rest or ".key." in rest or ".value." in rest:
                continue
            name = next(f"backbone.blocks.{number}.{rest.replace(theirs, ours)}" for theirs, ours in layer.items()
                        if rest.startswith(theirs))
        renamed[name] = value
    for number in range(4):
        start = f"backbone.encoder.layer.{number}.attention.attention."
        parts = [state[f"{start}{part}.weight"] for part in ("query", "key", "value")]
        renamed[f"backbone.blocks.{number}.attn.qkv.weight"] = np.concatenate(parts)
        renamed[f"backbone.blocks.{number}.attn.q_bias"] = state[f"{start}query.bias"]
        renamed[f"backbone.blocks.{number}.attn.v_bias"] = state[f"{start}value.bias"]
    return renamed


def assert_same(found, wanted):
    found, wanted = flatten(found), flatten(wanted)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_names_of_mmsegmentation_give_the_same_parameters(state):
    renamed, wanted = in_mmseg(state), from_hf(state)
    renamed["backbone.blocks.0.attn.relative_position_index"] = np.zeros(3)
    for found in (from_mmseg(renamed), layouts.read(renamed, None), layouts.read(state, None)):
        assert_same(found, wanted)
    with pytest.raises(UserError, match="is no part of an UperNet"):
        layouts.read({**renamed, "decode_head.other.weight": np.zeros(3)}, None)


@pytest.mark.parametrize(("name", "write", "renamed"), [("hf", to_hf, dict), ("upernet", to_mmseg, in_mmseg)])
def test_what_is_written_has_their_names_and_numbers_and_is_read_again_bit_for_bit(name, write, renamed, state):
    config, params = tiny_segment(FIELDS), from_hf(state)
    table = state["backbone.embeddings.position_embeddings"].copy()
    joined = {"backbone.embeddings.cls_token": state["backbone.embeddings.cls_token"] + table[:, :1]}
    table[:, 0] = 0  # has joined the token
    counts = {name.replace("running_var", "num_batches_tracked"): 0 for name in state if name.endswith("running_var")}
    wanted = {**state, **joined, **counts, "backbone.embeddings.position_embeddings": table}
    assert_same(write(params, config), renamed(wanted))
    assert_same(layouts.get(name).from_(write(params, config), config), params)


def test_biases_of_keys_and_the_last_norm_are_left_out_before_anything_is_compared(state):
    config, params = tiny_segment(FIELDS), from_hf(state)
    plain = {name: leaf.copy() for name, leaf in flatten(params).items()}
    params["encoder"]["norm"] = {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)}
    for number in range(4):
        params["encoder"][f"block_{number:02d}"]["attn"]["qkv"]["bias"][16:32] = number + 1.0
    for layout in ("hf", "upernet"):
        assert_same(weights.of_layout(params, config, layout, "here", ()).params, plain)


@pytest.mark.parametrize(("fields", "why"), [
    ({"method.norm": "layer"}, "layer norm"), ({"method.encoder_norm": True}, "encoder_norm"),
    ({"model.positions": "fixed"}, "positions=learned"), ({"model.patch": (8, 8)}, "8 pixels"),
    ({"method.blocks": "0,0,2,3"}, "block twice"), ({"data.image_size": (64, 128)}, "64x128")])
def test_what_their_backbone_cannot_hold_is_refused_by_name(fields, why):
    config = tiny_segment(FIELDS | fields)
    for layout in ("hf", "upernet"):
        assert why in layouts.get(layout).refuses(config)
    assert "no UperNet" in layouts.get("upernet").refuses(tiny_segment({}))
    assert not layouts.get("hf").whole(tiny_segment({}))


def test_the_folder_of_transformers_describes_the_model(state):
    config = tiny_segment(FIELDS)
    exported = layouts.Exported(from_hf(state), config)
    said, backbone = upernet.hf_config(config), upernet.hf_config(config)["backbone_config"]
    assert (said["hidden_size"], said["auxiliary_channels"], len(said["id2label"])) == (12, 8, 5)
    assert backbone["out_features"] == ["stage1", "stage2", "stage3", "stage4"]
    assert hf.kind_of(exported.params) == "UperNetForSemanticSegmentation"
    assert set(hf.LAYOUT.beside(exported)) == {"config.json", "preprocessor_config.json"}
