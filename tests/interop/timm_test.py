"""Supervised models in timm's layout: its logits from the same weights (golden/make_timm.py), and the way back."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.config import default
from mae_jax.errors import UserError
from mae_jax.interop.mae import from_mae
from mae_jax.interop.timm import folded, timm_arguments, to_timm
from mae_jax.models.layers import sincos_positions
from mae_jax.ops.patches import PatchGrid
from mae_jax.param_tree import flatten
from tests.helpers.tiny import tiny_method
from tests.interop.parity_test import cut

TOLERANCE = 1e-5  # of the largest logit
CASES = {"deit3": {"pool": "cls", "layer_scale": 1e-4}, "average": {"pool": "mean", "layer_scale": 0.0}}


def supervised(case, **method):
    config = default("supervised")
    config.batch_size = 3
    config.data.image_size = (24, 32)
    config.model.update(width=24, depth=2, heads=3, patch=(8, 8), positions="learned", dtype="float32", **CASES[case])
    config.method.update(classes=5, **method)
    return config


def logits_of(config, params, pictures, extras=None):
    patches = cut(pictures, config.model.patch[0])
    order = np.tile(np.arange(patches.shape[1], dtype=np.int32), (len(patches), 1))
    batch = {"patches": patches, "order": order}
    return np.asarray(jax.jit(tiny_method(config).logits)(params, extras or {}, batch))


def random_params(config):
    """Random values everywhere, so that a scale taken for a bias or a transposed square shows."""
    method, rng = tiny_method(config), np.random.default_rng(0)
    shapes, _ = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
    return jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), shapes)


def exported(config, params):
    return to_timm(params, PatchGrid.of(config).shape, config.model.patch)


@pytest.fixture(scope="module", params=list(CASES))
def golden(request):
    """(case, its state dict, images, logits), as timm has them."""
    with np.load(Path(__file__).parents[1] / "golden" / "timm.npz") as file:
        arrays = {key.removeprefix(f"{request.param}/"): file[key] for key in file if key.startswith(request.param)}
    state = {key.removeprefix("weight/"): value for key, value in arrays.items() if key.startswith("weight/")}
    return request.param, state, arrays["pictures"], arrays["logits"]


@pytest.mark.parametrize("scan", [False, True])
def test_logits_are_those_of_timm(golden, scan):
    case, state, pictures, wanted = golden
    config = supervised(case)
    config.model.scan = scan
    found = logits_of(config, from_mae(state, PatchGrid.of(config).shape), pictures)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


def test_every_one_of_timms_names_is_read_and_written(golden):
    case, state, _, _ = golden
    config = supervised(case)
    params = from_mae(state, PatchGrid.of(config).shape)
    shapes = jax.tree.map(lambda leaf: leaf.shape, random_params(config))
    assert flatten(jax.tree.map(np.shape, params)).keys() == flatten(shapes).keys()
    back = exported(config, params)
    assert back.keys() == state.keys()
    moved = {"cls_token", "pos_embed"} if case == "average" else set()  # the class token's position joined the token
    for name in state.keys() - moved:
        np.testing.assert_array_equal(back[name], state[name], err_msg=name)
    if moved:
        assert not back["pos_embed"][0, 0].any()
        np.testing.assert_array_equal(back["pos_embed"][0, 1:], state["pos_embed"][0, 1:])
        np.testing.assert_array_equal(back["cls_token"], state["cls_token"] + state["pos_embed"][:, :1])


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_keeps_every_bit(case):
    config = supervised(case)
    params = flatten(random_params(config))
    back = flatten(from_mae(exported(config, random_params(config)), PatchGrid.of(config).shape))
    assert back.keys() == params.keys()
    for name, leaf in params.items():
        np.testing.assert_array_equal(back[name], leaf, err_msg=name)


def test_fixed_positions_are_written_and_read_as_no_parameter():
    config = supervised("average")
    config.model.positions = "fixed"
    params = random_params(config)
    state = exported(config, params)
    np.testing.assert_array_equal(state["pos_embed"][0, 1:], sincos_positions((3, 4), 24))
    assert flatten(from_mae(state)).keys() == flatten(params).keys()


@pytest.mark.parametrize(("rows", "where", "first"), [
    (16, None, False), (17, None, True), (12, (3, 4), False), (13, (3, 4), True), (10, (3, 3), True),
    (10, (2, 5), False), (16, (7, 7), False), (50, (14, 14), True)])
def test_the_class_tokens_position_is_recognised(rows, where, first):
    table = np.random.default_rng(0).standard_normal((1, rows, 8)).astype(np.float32)
    encoder = from_mae({"cls_token": np.ones((1, 1, 8)), "pos_embed": table}, where)["encoder"]
    np.testing.assert_array_equal(encoder["pos_embed"], table[0, int(first):])
    np.testing.assert_array_equal(encoder["cls_token"][0, 0], 1 + table[0, 0] if first else np.ones(8))


def test_layer_scale_of_deit_iiis_own_files_is_read():
    config = supervised("deit3")
    params = random_params(config)
    old = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
           for key, value in exported(config, params).items()}
    assert "blocks.1.gamma_2" in old
    np.testing.assert_array_equal(from_mae(old)["encoder"]["block_01"]["ls2"]["gamma"],
                                  params["encoder"]["block_01"]["ls2"]["gamma"])


def test_models_of_another_kind_are_refused_by_name():
    state = exported(supervised("deit3"), random_params(supervised("deit3")))
    for changed, text in (({**state, "reg_token": np.zeros((1, 4, 24))}, "reg_token is not a parameter"),
                          ({**state, "blocks.0.attn.q_norm.weight": np.ones(8)}, "q_norm.weight is not a parameter"),
                          ({key: value for key, value in state.items() if key != "cls_token"}, "cls_token is missing")):
        with pytest.raises(UserError, match=text):
            from_mae(changed)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_folded_probe_gives_the_logits_of_batch_norm_and_head(pool):
    config = supervised("average", head="probe")
    config.model.pool = pool
    params, rng = random_params(config), np.random.default_rng(1)
    extras = {"batch_norm": {"mean": rng.normal(size=24).astype(np.float32),
                             "var": rng.uniform(0.1, 4, 24).astype(np.float32)}}
    pictures = rng.integers(0, 256, (3, 24, 32, 3), np.uint8)
    wanted = logits_of(config, params, pictures, extras)
    plain = folded(params, extras)
    fresh = {"batch_norm": {"mean": jnp.zeros(24), "var": jnp.ones(24)}}  # does nothing
    assert np.abs(logits_of(config, params, pictures, fresh) - wanted).max() > 0.1
    np.testing.assert_allclose(logits_of(config, plain, pictures, fresh), wanted, rtol=0,
                               atol=TOLERANCE * np.abs(wanted).max())


def test_a_head_without_batch_norm_is_left_as_it_is():
    params = random_params(supervised("deit3"))
    assert folded(params, {}) == params


def test_arguments_name_where_the_norm_is_and_what_deit_iii_has_more():
    assert timm_arguments(supervised("deit3"), 5) == {
        "img_size": (24, 32), "patch_size": (8, 8), "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 4,
        "num_classes": 5, "global_pool": "token", "fc_norm": False, "init_values": 1e-4, "no_embed_class": True}
    mean = timm_arguments(supervised("average"), 5)
    assert (mean["global_pool"], mean["fc_norm"]) == ("avg", True)
    assert not {"init_values", "no_embed_class"} & mean.keys()
    assert timm_arguments(supervised("average", head="probe"), 5)["fc_norm"] is False
