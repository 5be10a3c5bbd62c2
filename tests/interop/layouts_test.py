"""Weights in the layouts of other libraries; numerical parity with them is in parity_test.py."""

import jax
import numpy as np
import pytest

from mae_jax.config import default
from mae_jax.errors import UserError
from mae_jax.interop import layouts
from mae_jax.interop.hf import from_hf, to_hf
from mae_jax.interop.mae import from_mae, to_mae
from mae_jax.interop.timm import to_timm
from mae_jax.models.layers import sincos_positions
from mae_jax.param_tree import flatten
from tests.helpers.tiny import tiny_method

GRID, PATCH = (2, 3), (8, 4)


@pytest.fixture(scope="module")
def params():
    """Random values everywhere, so that a scale taken for a bias or a transposed square shows."""
    config = default()
    config.data.image_size = (16, 12)
    config.model.update(width=16, depth=11, heads=2, patch=PATCH)  # 11: block 10 sorts before block 2 as text
    config.method.update(decoder_width=12, decoder_depth=2, decoder_heads=3, mask_ratio=0.5)
    config.batch_size = 1
    shapes = jax.eval_shape(tiny_method(config).init, jax.random.key(0), tiny_method(config).batch_spec())
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes[0])


def assert_same(tree, other):
    tree, other = flatten(tree), flatten(other)
    assert tree.keys() == other.keys()
    for name, leaf in tree.items():
        np.testing.assert_array_equal(leaf, other[name], err_msg=name)


@pytest.mark.parametrize(("to", "back"), [(to_hf, from_hf), (to_mae, from_mae)])
def test_a_round_trip_keeps_every_bit(params, to, back):
    assert_same(params, back(to(params, GRID, PATCH)))


@pytest.mark.parametrize("grid", [(2, 4), (4, 6), (6, 8)])  # with the class token as many as a square has
def test_positions_of_hugging_face_begin_with_the_class_tokens_whatever_the_grid(params, grid):
    assert_same(params, from_hf(to_hf(params, grid, PATCH)))


@pytest.mark.parametrize(("to", "back"), [(to_hf, from_hf), (to_mae, from_mae)])
def test_an_encoder_alone_makes_the_round_trip(params, to, back):
    encoder = {"encoder": params["encoder"]}
    assert_same(encoder, back(to(encoder, GRID, PATCH)))


BLOCK = ["layernorm_before", "attention.attention.query", "attention.attention.key", "attention.attention.value",
         "attention.output.dense", "layernorm_after", "intermediate.dense", "output.dense"]
NAMES = {  # of a model of 11 blocks with a decoder of 2, as transformers 4.57.1 says them in its state_dict
    "vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "decoder.mask_token", "decoder.decoder_pos_embed",
    *(f"{layer}.{leaf}" for leaf in ("weight", "bias") for layer in (
        "vit.embeddings.patch_embeddings.projection", "vit.layernorm", "decoder.decoder_embed", "decoder.decoder_norm",
        "decoder.decoder_pred", *(f"vit.encoder.layer.{i}.{part}" for i in range(11) for part in BLOCK),
        *(f"decoder.decoder_layers.{i}.{part}" for i in range(2) for part in BLOCK))),
}
NEWER = {  # what transformers 5.24.0 calls them
    "vit.encoder.layer.": "vit.layers.", "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj", "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}


def newer(state):
    """Returns a state dict with the names of transformers 5."""
    for before, now in NEWER.items():
        state = {key.replace(before, now): value for key, value in state.items()}
    return state


def test_hugging_face_keys_are_those_that_transformers_4_and_5_load(params):
    state = to_hf(params, GRID, PATCH)
    assert state.keys() == NAMES
    assert state["vit.embeddings.patch_embeddings.projection.weight"].shape == (16, 3, 8, 4)
    assert state["vit.encoder.layer.10.attention.attention.key.weight"].shape == (16, 16)
    assert state["decoder.decoder_layers.1.intermediate.dense.weight"].shape == (48, 12)
    assert state["decoder.decoder_pred.weight"].shape == (96, 12)


def test_query_key_and_value_are_thirds_of_the_fused_kernel(params):
    state = to_hf(params, GRID, PATCH)
    kernel = params["encoder"]["block_03"]["attn"]["qkv"]["kernel"]
    for index, part in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(state[f"vit.encoder.layer.3.attention.attention.{part}.weight"],
                                      kernel[:, 16 * index:16 * (index + 1)].T)


def test_the_patch_embedding_becomes_the_convolution_that_does_the_same(params):
    pixels = np.random.default_rng(1).standard_normal((8, 4, 3)).astype(np.float32)
    convolution = to_hf(params, GRID, PATCH)["vit.embeddings.patch_embeddings.projection.weight"]
    np.testing.assert_allclose(np.einsum("rxc,dcrx->d", pixels, convolution),
                               pixels.reshape(-1) @ params["encoder"]["patch_embed"]["kernel"], rtol=1e-4, atol=1e-5)


def test_positions_are_written_with_a_zero_class_row(params):
    for key, width in (("vit.embeddings.position_embeddings", 16), ("decoder.decoder_pos_embed", 12)):
        table = to_hf(params, GRID, PATCH)[key]
        assert table.shape == (1, 7, width)
        assert not table[0, 0].any()
        np.testing.assert_array_equal(table[0, 1:], sincos_positions(GRID, width))


def test_names_of_transformers_5_are_read(params):
    state = newer(to_hf(params, GRID, PATCH))
    assert {"vit.layers.10.attention.o_proj.bias", "decoder.decoder_layers.1.mlp.fc2.weight"} <= state.keys()
    assert_same(params, from_hf(state))


@pytest.mark.parametrize("version", [4, 5])
def test_files_of_the_bare_encoder_have_no_prefix(params, version):
    encoder = {"encoder": params["encoder"]}
    state = to_hf(encoder, GRID, PATCH) if version == 4 else newer(to_hf(encoder, GRID, PATCH))
    state = {key.removeprefix("vit."): value for key, value in state.items()}
    assert_same(encoder, from_hf(state))
    assert_same(encoder, layouts.read(state, None))


def test_timm_gets_the_encoder_and_nothing_that_it_would_take_for_another_model(params):
    state = to_timm(params, GRID, PATCH)
    assert state.keys() == to_mae({"encoder": params["encoder"]}, GRID, PATCH).keys()
    assert {"cls_token", "pos_embed", "norm.weight", "blocks.10.attn.qkv.bias"} <= state.keys()


VALUE = "vit.encoder.layer.2.attention.attention.value.bias"


def changed(params, remove=(), **extra):
    state = to_hf(params, GRID, PATCH) | extra
    return {key: value for key, value in state.items() if key not in remove}


def test_what_cannot_be_read_is_refused_by_name(params):
    learned = to_hf(params, GRID, PATCH)["decoder.decoder_pos_embed"] + 0.01
    for state, text in (
        (changed(params, **{"qa_outputs.weight": np.zeros((2, 16))}), "qa_outputs.weight"),
        (changed(params, **{"decoder.decoder_pos_embed": learned}), "learned positions"),
        (changed(params, **{"vit.encoder.layer.2.lambda": np.zeros(16)}), "vit.encoder.layer.2.lambda"),
        (changed(params, **{"blocks.2.norm1.weight": np.zeros(16)}), "blocks.2.norm1.weight"),
        (changed(params, remove=[VALUE]), f"{VALUE} is missing"),
        (changed(params, remove=[VALUE.replace("value", "query")]), r"2\.attention\.attention\.query\.bias is missing"),
        (newer(changed(params, remove=[VALUE])), f"{VALUE} is missing"),
    ):
        with pytest.raises(UserError, match=text):
            from_hf(state)


def test_hugging_faces_layout_has_a_classifier_of_the_class_token_and_refuses_the_norm_of_a_mean(params):
    encoder = {"encoder": params["encoder"]}
    head = {"kernel": np.ones((16, 3), np.float32), "bias": np.arange(3, dtype=np.float32)}
    state = to_hf({**encoder, "head": head}, GRID, PATCH)
    assert state["classifier.weight"].shape == (3, 16)
    assert_same({**encoder, "head": head}, from_hf(state))
    with pytest.raises(UserError, match=r"fc_norm\.bias .*--layout=timm"):
        to_hf({**encoder, "head": head, "fc_norm": {"bias": np.zeros(16)}}, GRID, PATCH)


def test_the_published_layouts_refuse_layer_scale_by_name(params):
    scaled = params["encoder"] | {"block_03": params["encoder"]["block_03"] | {"ls1": {"gamma": np.ones(16)}}}
    for to in (to_hf, to_mae):
        with pytest.raises(UserError, match="encoder/block_03/ls1/gamma"):
            to({"encoder": scaled}, GRID, PATCH)


def test_what_the_layouts_cannot_hold_is_refused_by_name(params):
    with pytest.raises(UserError, match="encoder/mask_token"):
        to_hf({"encoder": params["encoder"] | {"mask_token": np.zeros((1, 1, 16))}}, GRID, PATCH)
