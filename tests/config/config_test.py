"""Durations, presets, one-line refusals, command-line overrides, and what a resumed run may change."""

import importlib.util
import json
from pathlib import Path

import jax
import pytest
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from mae_jax import config as configs
from mae_jax.config import default, for_platform, from_dict, resolve, steps, validate, vit
from mae_jax.errors import UserError, did_you_mean
from mae_jax.param_tree import flat
from mae_jax.runtime import sharding
from mae_jax.storage import paths
from mae_jax.training import ending, workdir
from tests.helpers.tiny import tiny_config

RECIPES = sorted(Path("configs").glob("*.py"))


@pytest.mark.parametrize(("duration", "count"), [
    ("800 epochs", 800 * 1_281_167 // 4096), ("1 epoch", 312), ("0.5 epochs", 156), ("100 steps", 100), ("1 step", 1),
    ("5e6 examples", 1220), ("4096 examples", 1), ("4095 examples", 0), ("", 0), (" 7  steps ", 7), ("1e2 steps", 100),
    ("4e8 examples, at most 300 epochs", 300 * 1_281_167 // 4096), ("5e6 examples, at most 300 epochs", 1220),
    ("1 epochs, at least 400 steps", 400), ("2 epochs, at least 400 steps", 625)])
def test_durations_become_whole_steps(duration, count):
    assert steps(duration, batch_size=4096, examples=1_281_167) == count


def test_a_duration_in_examples_and_epochs_of_the_same_length_agree():
    for batch_size in range(1, 60):
        for epochs in range(1, 8):
            assert steps(f"{epochs} epochs", batch_size, 35) == epochs * 35 // batch_size
            assert steps(f"{epochs * 35} examples", batch_size, 35) == epochs * 35 // batch_size


@pytest.mark.parametrize("duration", [
    "800", "5 steps, at most", "5 steps, at least", "5 steps, at least 4", "1 step, at least 2 steps, at most 3 steps",
    "epochs", "800 epoch s", "-3 steps", "1.2.3 steps", ".",
    ". steps", "1e400 steps", "ten steps", "5 batches"])
def test_a_duration_that_cannot_be_read_is_refused_with_examples(duration):
    with pytest.raises(UserError, match="'800 epochs', '100 steps' or '5e6 examples'"):
        steps(duration, 8, 100)


def test_nearest_names_the_close_one_and_all():
    assert did_you_mean("rnadom", ("random", "block")) == "did you mean 'random'? known: block, random"
    assert did_you_mean("x", ("random", "block")) == "known: block, random"
    assert did_you_mean("x", ()) == "known: none"


@pytest.mark.parametrize(("fields", "line"), [
    ({"data.augment": "rnadom"}, "data.augment='rnadom'; did you mean 'random'?"),
    ({"data.resize": "quick"}, "data.resize='quick'; known: exact, fast"),
    ({"model.remat": "dot"}, "did you mean 'dots'?"),
    ({"optim.name": "adam"}, "did you mean 'adamw'?"),
    ({"batch_size": 0}, "batch_size=0; it must be at least 1"),
    ({"batch_size": 9, "train.accumulate": 2}, "batch_size=9 is not a multiple of train.accumulate=2"),
    ({"data.image_size": (30, 16)}, "height 30 is not a multiple of the patch size 4; nearest: 28 and 32"),
    ({"data.image_size": (16, 3)}, "width 3 is not a multiple of the patch size 4; nearest: 4"),
    ({"data.image_size": (16,)}, "data.image_size=(16,); expected two numbers"),
    ({"model.patch": (0, 4)}, "model.patch=[0, 4]; it must be at least 1"),
    ({"model.width": 30}, "sin-cos positions need a multiple of 4"),
    ({"model.heads": 3}, "model.width=32 is not a multiple of model.heads=3"),
    ({"checkpoint.keep_last": 1}, "keep at least 2"),
    ({"optim.lr": -1.0}, "optim.lr=-1.0; it must not be negative"),
    ({"optim.betas": (0.9, 1.0)}, "it must be below 1"),
    ({"optim.ema": 1.0}, "optim.ema=1.0; it must be below 1"),
    ({"eval.knn_k": 0}, "eval.knn_k=0; it must be at least 1"),
    ({"guard.max_nonfinite": 0}, "it must be at least 1"),
    ({"log.every": ""}, "log.every is ''"),
    ({"log.profile_steps": "20"}, "log.profile_steps='20'; write the first and the last step, as '20:25'"),
    ({"log.profile_steps": "25:20"}, "as '20:25'"),
    ({"checkpoint.every": "20 epoks"}, "cannot read the duration '20 epoks'"),
    ({"method.name": "mea"}, "unknown method.name 'mea'; did you mean 'mae'?"),
])
def test_a_value_that_cannot_work_is_refused_in_one_line(fields, line):
    with pytest.raises(UserError) as error:
        tiny_config(fields)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'XL'.* 'L'"):
        vit("XL", 16)


def test_a_misspelt_field_in_a_recipe_is_refused():
    config = default("mae")
    with pytest.raises(KeyError, match="image_size"):
        config.data.update(imagesize=(32, 32))
    with pytest.raises(AttributeError, match="weight_decay"):
        config.optim.weightdecay = 0.1


def test_presets_apply_in_order_and_runlocal_last():
    seen = []

    def big(config):
        seen.append(config.batch_size)
        config.batch_size = 4096

    config = resolve(default("mae"), "runlocal,big", big=big)
    assert seen == [256]
    assert config.batch_size == 16
    assert config.is_locked
    with pytest.raises(UserError, match=r"'bgi'.* 'big'"):
        resolve(default("mae"), "bgi", big=big)


def test_presets_apply_in_the_recipes_order_whatever_that_of_the_argument():
    def size(config):
        config.model.depth = 24

    def half(config):
        config.model.depth //= 2

    for arg in ("size,half", "half,size"):
        assert resolve(default("mae"), arg, {"size": size}, half=half).model.depth == 12


def test_of_two_presets_that_exclude_each_other_neither_is_chosen():
    with pytest.raises(UserError, match="'B' and 'L'"):
        resolve(default("mae"), "L,B", {"B": vit, "L": vit})


def recipe(path: Path, arg: str = "") -> ConfigDict:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_locked_and_says_how_to_run_it(path):
    config = recipe(path)
    assert config.is_locked
    validate(config)
    text = path.read_text()
    assert text.startswith(('"""', 'r"""'))
    assert f"--config={path}" in text


def leaves(config: ConfigDict, prefix: str = "") -> dict:
    out = {}
    for key, value in config.items():
        out |= leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
    return out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_leaf_of_every_recipe_can_be_overridden_on_the_command_line(path, monkeypatch):
    def other(value):
        if isinstance(value, bool):
            return not value
        if isinstance(value, tuple):
            return tuple(item * 2 for item in value)
        return value + "x" if isinstance(value, str) else value * 2 + 1

    wanted = {name: other(value) for name, value in leaves(recipe(path)).items()}
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "recipe", flag_values=values)
    argv = ["main", f"--config={path}", *(f"--config.{name}={value}" for name, value in wanted.items())]
    monkeypatch.setattr("sys.argv", argv)  # where ml_collections looks for the overrides
    values(argv)
    assert leaves(values.config) == wanted
    assert {type(value) for value in wanted.values()} <= {bool, int, float, str, tuple}


def test_a_config_comes_back_from_json_as_it_went():
    config = tiny_config()
    assert from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


def test_flat_names_every_leaf_by_its_path():
    values = flat(tiny_config())
    assert values["data.image_size"] == [16, 16]
    assert values["method.mask_ratio"] == 0.75
    assert values.keys() == leaves(tiny_config()).keys()


def test_a_resumed_run_may_change_how_it_is_watched_placed_and_ended():
    fields = {"train.duration": "60 steps", "mesh.data": 1, "eval.every": "1 steps", "checkpoint.keep_last": 5,
              "log.every": "2 steps", "guard.max_nonfinite": 3, "data.threads": 1, "data.prefetch": 5,
              "model.scan": True, "model.remat": "full"}
    changes = workdir.compare(tiny_config(), tiny_config(fields))
    assert {change.split(":")[0] for change in changes} == set(fields)
    assert "train.duration: '6 steps' -> '60 steps'" in changes


def test_a_workdir_of_another_config_is_refused_with_the_list_and_left_alone(tmp_path):
    folder = epath.Path(tmp_path) / "run"
    assert workdir.changes(folder, tiny_config()) == []
    workdir.record(folder, tiny_config())
    assert workdir.changes(folder, tiny_config()) == []
    before = (folder / "config.json").read_text()
    other = tiny_config({"optim.lr": 0.1, "seed": 3, "train.duration": "60 steps"})
    with pytest.raises(UserError, match=r"optim.lr: 0.05 -> 0.1; seed: 0 -> 3\b") as error:
        workdir.changes(folder, other)
    assert "train.duration" not in str(error.value)
    assert (folder / "config.json").read_text() == before
    with pytest.raises(UserError, match=r"config; method.name: 'mae' -> 'dino'; and \d+ more fields\. Use"):
        workdir.changes(folder, tiny_config(method="dino"))


def test_the_workdir_records_config_and_versions(tmp_path):
    folder = epath.Path(tmp_path) / "run"
    workdir.record(folder, tiny_config())
    assert workdir.read_config(folder).to_dict() == tiny_config().to_dict()
    record = json.loads((folder / "config.json").read_text())
    assert record["versions"]["jax"]
    assert "git_commit" in record
    assert [file.name for file in folder.iterdir()] == ["config.json"]


def test_a_copy_from_git_archive_knows_its_commit(monkeypatch):
    monkeypatch.setattr(workdir, "ARCHIVED", "0a1b2c")
    assert workdir.git_commit() == "0a1b2c"


@pytest.mark.parametrize("text", [b"", b'{"config": {"seed"', b"[]", b"{}", b'{"config": {"\xff": 1}}'])
def test_a_damaged_config_json_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        workdir.read_config(epath.Path(tmp_path))


def test_a_folder_that_is_no_workdir_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        workdir.read_config(epath.Path(tmp_path))


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the workdir"):
        workdir.record(epath.Path(tmp_path) / "file" / "run", tiny_config())


def test_replacing_a_file_on_a_full_disk_keeps_the_old_one(tmp_path, monkeypatch):
    file = epath.Path(tmp_path) / "config.json"
    paths.replace_text(file, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(file), "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        paths.replace_text(file, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.json", "old")]


@pytest.mark.parametrize(("text", "step"), [(None, 0), (b"", 0), (b"120\n", 120), (b"12x", 0), (b"12\xb2", 0)])
def test_done_names_the_last_step_and_a_damaged_one_is_none(tmp_path, text, step):
    if text is not None:
        (tmp_path / "DONE").write_bytes(text)
    assert ending.finished(epath.Path(tmp_path)) == step


def test_the_table_of_sizes_is_that_of_the_papers():
    assert configs.SIZES["L"] == (1024, 24, 16)
    assert vit("H", 14) == {"width": 1280, "depth": 32, "heads": 16, "patch": (14, 14)}


@pytest.mark.parametrize(("platform", "dtype", "zero"), [("cpu", "float32", "off"), ("tpu", "bfloat16", "on"),
                                                         ("gpu", "bfloat16", "on")])
def test_auto_stands_for_what_suits_the_platform_and_stays_auto_in_the_config(platform, dtype, zero):
    config = default()
    found = for_platform(config, platform)
    assert (found.model.dtype, found.mesh.zero) == (dtype, zero)
    assert (config.model.dtype, config.mesh.zero) == ("auto", "auto")


def test_bfloat16_sums_need_bfloat16_activations():
    config = default()
    config.mesh.reduce = "bfloat16"
    with pytest.raises(UserError, match=r"mesh.reduce=bfloat16 .*float32"):
        sharding.make_mesh(for_platform(config, "cpu"), jax.devices()[:1])
    config.model.dtype = "bfloat16"
    assert sharding.make_mesh(for_platform(config, "cpu"), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(("fields", "line"), [
    ({"eval.crop_ratio": ("abc",)}, "eval.crop_ratio=['abc']; expected values such as (0.875,)"),
    ({"data.crop_scale": ("a", "b")}, "data.crop_scale=['a', 'b']; expected values such as (0.2, 1.0)"),
    ({"eval.sets": (3,)}, "eval.sets=[3]; expected values such as ('imagenet_v2',)"),
    ({"optim.lr": float("nan")}, "optim.lr=nan; it must be finite"),
    ({"optim.betas": (0.9, float("inf"))}, "optim.betas=[0.9, inf]; it must be finite"),
    ({"data.image_size": (16.0, 16.0)}, "data.image_size=[16.0, 16.0]; expected whole numbers such as (224, 224)"),
    ({"method.mask_ratio": float("nan")}, "method.mask_ratio=nan; it must be finite")])
def test_values_of_another_kind_and_numbers_that_are_not_finite_are_refused(fields, line):
    with pytest.raises(UserError) as error:
        tiny_config(fields)
    assert str(error.value) == line
