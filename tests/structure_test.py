"""The shape of the house: who may import what, how long a function may be, and life without TensorFlow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = sorted(Path("mae_jax").rglob("*.py"))
EVERYTHING = PACKAGE + sorted(Path("tests").rglob("*.py")) + sorted(Path("configs").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Returns the top-level names of all packages that the file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(("library", "home"), [
    ("flax", "mae_jax/models"), ("tensorflow", "mae_jax/data"), ("tensorflow_datasets", "mae_jax/data"),
    ("orbax", "mae_jax/storage/checkpoint.py")])
def test_a_library_is_imported_in_its_own_room_only(library, home):
    users = {path for path in PACKAGE if library in imported(path)}
    assert users
    assert {path for path in users if not path.is_relative_to(home)} == set()


def test_nothing_that_is_read_is_executed():
    """No pickles, no evaluated texts, and NumPy's files are opened where objects in them are refused."""
    for path in PACKAGE:
        assert not imported(path) & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("eval", "exec", "compile", "__import__"), f"{path}:{node.lineno}"
            assert called != "np.load" or path == Path("mae_jax/storage/npz.py"), f"{path}:{node.lineno}"


def test_methods_and_models_know_nothing_of_loop_optimiser_files_or_mesh():
    for path in PACKAGE:
        if path.parent.name not in ("methods", "models", "ops"):
            continue
        modules = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        for part in ("train", "step", "optim", "sharding", "checkpoint", "workdir", "metrics", "evals"):
            assert f"mae_jax.{part}" not in modules, path


def functions(path: Path) -> list[tuple[str, int]]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return [(f"{path}:{node.name}", node.end_lineno - node.lineno + 1) for node in nodes]


def test_no_function_is_longer_than_60_lines_but_the_table_of_defaults():
    long = {name: lines for path in EVERYTHING for name, lines in functions(path) if lines > 60}
    assert set(long) <= {"mae_jax/config.py:default"}


def test_half_of_the_packages_functions_have_at_most_10_lines():
    lengths = sorted(lines for path in PACKAGE for _, lines in functions(path))
    assert lengths[len(lengths) // 2] <= 10


def test_no_file_of_the_package_is_longer_than_400_lines():
    assert {path: lines for path in PACKAGE if (lines := path.read_text().count("\n")) > 400} == {}


def test_every_module_and_public_function_of_the_package_says_what_it_does():
    for path in PACKAGE:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not tree.body, path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node) or node.name == "main", f"{path}:{node.name}"


WITHOUT_TENSORFLOW = """
import importlib, pkgutil, sys
for name in ("tensorflow", "tensorflow_datasets", "tensorboard"):
    sys.modules[name] = None
import mae_jax, mae_jax.training.loop
from absl import flags
for module in pkgutil.walk_packages(mae_jax.__path__, "mae_jax."):
    if not module.name.startswith("mae_jax.data") and module.name != "mae_jax.__main__":
        flags.FLAGS._flags().clear()  # every command defines its own
        importlib.import_module(module.name)
"""


def test_everything_outside_data_imports_without_tensorflow():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TENSORFLOW], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
