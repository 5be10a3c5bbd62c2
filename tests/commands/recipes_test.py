"""Recipes by name and by path, and what --help says of their fields."""

import subprocess
import sys
from pathlib import Path

import pytest

import mae_jax
from mae_jax import methods
from mae_jax.commands import recipes
from mae_jax.config import default
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


def test_every_default_shows_its_value_and_what_it_is():
    lines = {line.split("=")[0].strip(): line for line in recipes.fields(default("moce")).splitlines()}
    assert lines.keys() == flat(default("moce")).keys()
    assert lines["batch_size"].split("  # ") == [f"{'  batch_size=256':<36}", "images per step, over all devices"]
    assert "with train_split='train[:90%]'" in lines["data.val_split"]  # from the line before
    assert lines["method.experts"].startswith("  method.experts=8  ")
    assert lines["method.experts"].endswith("from memory of the paper, not checked")
    assert lines["method.masking"].endswith("(MAE Table 1f)")  # of the table that moce takes over


@pytest.mark.parametrize("name", methods.TABLE)
def test_no_field_of_any_method_is_without_a_comment(name):
    lines = recipes.fields(default(name)).splitlines()
    assert [line for line in lines if "  # " not in line] == [f"  method.name={name!r}"]


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
