"""The encoder's shape comes from the weights that training starts from, where the recipe leaves it open."""

import json
import runpy

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from mae_jax import presets, recipe
from mae_jax.config import SHAPE, default, validate
from mae_jax.errors import UserError
from mae_jax.interop.hf import to_hf
from mae_jax.interop.mae import to_mae
from mae_jax.interop.timm import to_timm
from mae_jax.ops.patches import PatchGrid
from mae_jax.training import workdir
from mae_jax.training.warm_shape import of_weights, with_shape
from tests.helpers.tiny import tiny_config, tiny_params, tiny_supervised
from tests.training.warm_start_test import started, written

RECIPES = ["finetune", "linear_probe", "transfer", "folder_finetune", "quickstart_finetune", "segment"]
WIDE = {"model.width": 192, "model.depth": 3, "model.heads": 3, "model.mlp_ratio": 2}


def open_config(source: str, **fields: object) -> ConfigDict:
    """Returns a classifier's config whose shape is that of `source`."""
    config = tiny_supervised({"model.auto": SHAPE, **{f"model.{name}": value for name, value in fields.items()}})
    with config.unlocked():
        config.init_from = source
    return config


def of_others(folder, layout, config, said=None):
    """Writes the weights of a config's encoder as another library has them; returns where."""
    params = {"encoder": tiny_params(config)["encoder"]}
    save_file(layout(params, PatchGrid.of(config).shape, config.model.patch), folder / "model.safetensors")
    if said is not None:
        (folder / "config.json").write_text(json.dumps(said))
    return str(folder)


def test_mlps_of_no_whole_number_of_widths_are_refused(tmp_path):
    params = {"encoder": dict(tiny_params(tiny_config())["encoder"])}
    kernel = np.zeros((32, 80), np.float32)
    params["encoder"]["block_00"] = params["encoder"]["block_00"] | {"mlp": {"fc1": {"kernel": kernel}}}
    with pytest.raises(UserError, match=r"2\.5 times as wide"):
        of_weights(str(tmp_path), params)


@pytest.mark.parametrize(("layout", "said", "heads"), [
    (to_hf, {"model_type": "vit", "num_attention_heads": 6, "hidden_act": "gelu_pytorch_tanh"}, 6),
    (to_timm, {"architecture": "any", "model_args": {"num_heads": 12, "act_layer": "gelu_tanh"}}, 12),
    (to_mae, None, 3)])
def test_the_shape_of_others_weights_is_taken_and_told(tmp_path, caplog, layout, said, heads):
    caplog.set_level("INFO")
    source = of_others(tmp_path, layout, tiny_config(WIDE), said)
    config = with_shape(open_config(source))
    m = config.model
    assert (m.width, m.depth, m.heads, m.patch, m.mlp_ratio, m.auto) == (192, 3, heads, (4, 4), 2, ())
    assert m.gelu == ("tanh" if said else "erf")
    assert f"model.width=192, depth=3, heads={heads}, patch=(4, 4), mlp_ratio=2" in caplog.text
    assert ("published ViTs of width 192" in caplog.text) == (said is None)
    assert "what the recipe has for an encoder of width 32 and depth 2" in caplog.text
    validate(config)
    started(source, config)  # it fits


def test_the_shape_of_our_own_weights_is_that_of_their_config(tmp_path):
    theirs = tiny_supervised(WIDE | {"model.heads": 4, "model.patch": (2, 8), "model.gelu": "tanh",
                                     "model.layer_scale": 0.1, "model.positions": "learned"})
    source, _ = written(tmp_path, theirs)
    m = with_shape(open_config(source, positions="fixed")).model
    assert {field: m[field] for field in SHAPE} == {field: theirs.model[field] for field in SHAPE}


def test_fields_that_are_not_open_stay_and_what_contradicts_the_weights_is_refused_with_both(tmp_path):
    source, _ = written(tmp_path, tiny_config(WIDE))
    config = with_shape(open_config(source, auto=("depth",)))
    assert (config.model.width, config.model.depth, config.model.heads) == (32, 3, 2)
    with pytest.raises(UserError, match=r"model\.width=192, model\.mlp_ratio=2, where this config has 32, 4\."):
        started(source, config)


def test_heads_that_nothing_says_are_asked_for(tmp_path):
    source = of_others(tmp_path, to_mae, tiny_config({"model.width": 40}))
    with pytest.raises(UserError, match=r"number of attention heads, .*width 40; set --config\.model\.heads"):
        with_shape(open_config(source))
    config = open_config(source, width=40, heads=5, auto=("depth", "width"))
    assert (with_shape(config).model.heads, with_shape(config).model.width) == (5, 40)


def test_learned_positions_and_layer_scale_of_others_are_taken(tmp_path):
    config = tiny_supervised({"model.positions": "learned", "model.layer_scale": 0.1, "model.width": 192,
                              "model.heads": 3})
    found = with_shape(open_config(of_others(tmp_path, to_timm, config)))
    assert found.model.positions == "learned"
    assert found.model.layer_scale > 0
    started(found.init_from, found)


def test_a_file_of_something_else_is_refused_with_one_of_its_names_and_the_nearest(tmp_path):
    save_file({"layers.0.attention.wq.weight": np.ones((2, 2), np.float32)}, tmp_path / "a.safetensors")
    for check in (lambda config: with_shape(config), lambda config: started(str(tmp_path / "a.safetensors"), config)):
        with pytest.raises(UserError, match=r"layers\.0\.attention\.wq\.weight, and the nearest one .* is vit\.l"):
            check(open_config(str(tmp_path / "a.safetensors")))


def test_without_weights_the_recipes_own_shape_holds():
    config = open_config("")
    assert with_shape(config).model.width == 32
    assert with_shape(config).model.auto == ()


def test_a_resumed_run_has_the_shape_that_it_began_with(tmp_path):
    source, _ = written(tmp_path, tiny_config(WIDE))
    begun = with_shape(open_config(source))
    workdir.record(epath.Path(tmp_path / "run"), begun)
    again = workdir.continued(epath.Path(tmp_path / "run"), open_config(source))
    assert (again.model.width, again.model.depth, again.model.auto) == (192, 3, ())
    assert workdir.changes(epath.Path(tmp_path / "run"), again) == []


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_start_from_an_encoder_leave_its_shape_open(name):
    get_config = runpy.run_path(f"configs/{name}.py")["get_config"]
    assert get_config().model.auto == SHAPE
    assert get_config("runlocal").model.auto == ()
    with presets.given({"model.heads", "optim.lr"}):
        assert get_config().model.auto == tuple(field for field in SHAPE if field != "heads")


def test_the_benchmarking_detector_takes_learned_positions_where_its_encoder_has_them(tmp_path):
    auto, fixed = (recipe("detect:benchmarking_b").model[name] for name in ("auto", "positions"))
    assert (auto, fixed) == (("positions",), "fixed")
    for positions in ("learned", "fixed"):
        folder = tmp_path / positions
        folder.mkdir()
        source = of_others(folder, to_timm, tiny_supervised({"model.positions": positions}))
        config = open_config(source, auto=auto, positions=fixed)
        assert with_shape(config).model.positions == positions  # a table of sines is recognized
        source, _ = written(folder, tiny_config({"model.positions": positions}))
        assert with_shape(open_config(source, auto=auto, positions=fixed)).model.positions == positions


@pytest.mark.parametrize("name", RECIPES[:4])
def test_a_size_that_is_named_holds(name):
    config = runpy.run_path(f"configs/{name}.py")["get_config"]("B")
    assert (config.model.auto, config.model.width) == ((), 768)


def test_an_open_field_that_is_none_is_refused_with_the_nearest():
    config = default()
    config.model.auto = ("widht",)
    with pytest.raises(UserError, match=r"did you mean 'width'"):
        validate(config)
