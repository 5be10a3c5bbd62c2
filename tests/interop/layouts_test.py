"""Weights in the layouts of other libraries; numerical parity with them is in tests/parity_test.py."""

import jax
import numpy as np
import pytest

from mae_jax.config import default
from mae_jax.errors import UserError
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


def test_hugging_face_keys_are_those_of_transformers_5(params):
    state = to_hf(params, GRID, PATCH)
    assert state["vit.embeddings.patch_embeddings.projection.weight"].shape == (16, 3, 8, 4)
    assert state["vit.layers.10.attention.k_proj.weight"].shape == (16, 16)
    assert state["decoder.decoder_layers.1.mlp.fc1.weight"].shape == (48, 12)
    assert state["decoder.decoder_pred.weight"].shape == (96, 12)
    assert len(state) == 2 + 2 + 2 + 13 * 16 + 2 + 1 + 1 + 2 + 2


def test_query_key_and_value_are_thirds_of_the_fused_kernel(params):
    state = to_hf(params, GRID, PATCH)
    kernel = params["encoder"]["block_03"]["attn"]["qkv"]["kernel"]
    for index, letter in enumerate("qkv"):
        np.testing.assert_array_equal(state[f"vit.layers.3.attention.{letter}_proj.weight"],
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


def test_names_of_transformers_4_are_read(params):
    old = {}
    for key, value in to_hf(params, GRID, PATCH).items():
        for new, before in (("vit.layers.", "vit.encoder.layer."), ("attention.q_proj", "attention.attention.query"),
                            ("attention.k_proj", "attention.attention.key"),
                            ("attention.v_proj", "attention.attention.value"),
                            ("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
                            ("mlp.fc2", "output.dense")):
            key = key.replace(new, before)
        old[key] = value
    assert not old.keys() & {"vit.layers.0.mlp.fc1.weight"}
    assert_same(params, from_hf(old))


def test_files_of_the_bare_encoder_have_no_prefix(params):
    encoder = {"encoder": params["encoder"]}
    state = {key.removeprefix("vit."): value for key, value in to_hf(encoder, GRID, PATCH).items()}
    assert_same(encoder, from_hf(state))


def test_timm_gets_the_encoder_and_nothing_that_it_would_take_for_another_model(params):
    state = to_timm(params, GRID, PATCH)
    assert state.keys() == to_mae({"encoder": params["encoder"]}, GRID, PATCH).keys()
    assert {"cls_token", "pos_embed", "norm.weight", "blocks.10.attn.qkv.bias"} <= state.keys()


def changed(params, remove=(), **extra):
    state = to_hf(params, GRID, PATCH) | extra
    return {key: value for key, value in state.items() if key not in remove}


def test_what_cannot_be_read_is_refused_by_name(params):
    learned = to_hf(params, GRID, PATCH)["decoder.decoder_pos_embed"] + 0.01
    for state, text in (
        (changed(params, **{"classifier.weight": np.zeros((2, 16))}), "classifier.weight"),
        (changed(params, **{"decoder.decoder_pos_embed": learned}), "learned positions"),
        (changed(params, remove=["vit.layers.2.attention.v_proj.bias"]), "blocks.2.attention.v_proj.bias is missing"),
        (changed(params, remove=["vit.layers.2.attention.q_proj.bias"]), "blocks.2.attention.q_proj.bias is missing"),
    ):
        with pytest.raises(UserError, match=text):
            from_hf(state)


def test_hugging_faces_layout_refuses_a_classifier_and_names_the_layout_that_holds_it(params):
    with pytest.raises(UserError, match=r"head\.bias .*--layout=timm"):
        to_hf({"encoder": params["encoder"], "head": {"bias": np.zeros(3)}}, GRID, PATCH)


def test_the_published_layouts_refuse_layer_scale_by_name(params):
    scaled = params["encoder"] | {"block_03": params["encoder"]["block_03"] | {"ls1": {"gamma": np.ones(16)}}}
    for to in (to_hf, to_mae):
        with pytest.raises(UserError, match="encoder/block_03/ls1/gamma"):
            to({"encoder": scaled}, GRID, PATCH)


def test_what_the_layouts_cannot_hold_is_refused_by_name(params):
    with pytest.raises(UserError, match="encoder/mask_token"):
        to_hf({"encoder": params["encoder"] | {"mask_token": np.zeros((1, 1, 16))}}, GRID, PATCH)
