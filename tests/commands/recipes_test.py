"""Recipes by name and by path, and what --help says of their fields."""

import subprocess
import sys
from pathlib import Path

import pytest

import mae_jax
from mae_jax import methods
from mae_jax.commands import recipes
from mae_jax.config import DEFAULTS, default
from mae_jax.errors import UserError
from mae_jax.methods import fields
from mae_jax.param_tree import flat

CONFIGS = Path("configs").resolve()


@pytest.mark.parametrize(("given", "found"), [
    ("quickstart", f"{CONFIGS}/quickstart.py"),
    ("quickstart:runlocal", f"{CONFIGS}/quickstart.py:runlocal"),
    ("configs/quickstart.py:runlocal", "configs/quickstart.py:runlocal"),
    ("quickstart.py", "quickstart.py"),
    ("./quickstart", "./quickstart"),
    ("/far/mine.py:a,b", "/far/mine.py:a,b"),
])
def test_a_slash_or_py_makes_a_path_and_all_else_is_a_name(given, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # what lies where the command is run changes nothing
    assert recipes.locate(given) == found


@pytest.mark.parametrize(("given", "words"), [
    ("quikstart:runlocal", ["unknown recipe 'quikstart'", "did you mean 'quickstart'?", " more;", "./quikstart.py"]),
    ("", ["unknown recipe ''"]),
    ("vit_x_mae", ["vit_l_mae", "vit_b_mae"]),
])
def test_an_unknown_name_is_answered_with_the_nearest_ones(given, words):
    with pytest.raises(UserError) as error:
        recipes.locate(given)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_names_are_those_of_the_files_that_lie_beside_the_package_or_in_it(tmp_path, monkeypatch):
    assert recipes.names() == sorted(file.stem for file in CONFIGS.glob("*.py"))
    (tmp_path / "mae_jax/configs").mkdir(parents=True)
    (tmp_path / "mae_jax/configs/mine.py").touch()
    monkeypatch.setattr(mae_jax, "__file__", str(tmp_path / "mae_jax/__init__.py"))
    assert recipes.names() == ["mine"]


@pytest.mark.parametrize("argv", [["main", "--config=quickstart:a"], ["main", "--config", "quickstart:a", "--x"],
                                  ["main", "-config=quickstart:a"]])
def test_the_command_line_gets_the_path_however_the_flag_is_written(argv):
    there = [arg.replace("quickstart:a", f"{CONFIGS}/quickstart.py:a") for arg in argv]
    assert recipes.with_paths(argv) == there


def test_overrides_and_other_flags_stay_as_they_are():
    argv = ["main", "--config.data.name=quickstart", "--configs=quickstart", "--config"]
    assert recipes.with_paths(argv) == argv


def test_every_default_with_a_comment_shows_it_and_every_field_its_value():
    lines = {line.split("=")[0].strip(): line for line in recipes.fields(default("moce")).splitlines()}
    assert lines.keys() == flat(default("moce")).keys()
    assert lines["batch_size"].split("  # ") == [f"{'  batch_size=256':<36}", "images per step, over all devices"]
    assert "train_split is then 'train[:90%]'" in lines["data.val_split"]  # from the line before
    assert lines["data.source"] == "  data.source='photo_crops'"
    assert lines["method.experts"].endswith("# E; remembered of the article, not checked")
    assert lines["method.mask_ratio"] == "  method.mask_ratio=0.75"
    assert lines["method.masking"].endswith("MAE Table 1f")  # of the table that moce takes over
    commented = [line for line in lines.values() if "  # " in line]
    assert len(commented) > len(flat(DEFAULTS)) / 2


@pytest.mark.parametrize("name", methods.TABLE)
def test_the_fields_that_need_no_jax_are_those_of_the_methods_class(name):
    assert methods.get(name).defaults is fields.TABLE[name]


ALL_RECIPES = """
import runpy, sys
for file in sys.argv[1:]:
    config = runpy.run_path(file)["get_config"]()
    from mae_jax.commands import recipes
    assert "method.name" in recipes.fields(config)
loaded = {"jax", "flax", "optax", "orbax", "tensorflow"} & set(sys.modules)
assert not loaded, loaded
"""


def test_no_recipe_imports_jax_or_tensorflow():
    files = map(str, sorted(CONFIGS.glob("*.py")))
    done = subprocess.run([sys.executable, "-c", ALL_RECIPES, *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
