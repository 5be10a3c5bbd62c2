"""Who may import what, how long a function may be, and life without TensorFlow."""

import ast
import graphlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

from mae_jax import methods
from mae_jax.__main__ import COMMANDS
from mae_jax.config import OPTIMIZERS
from mae_jax.data.sources import registry
from mae_jax.interop import layouts
from mae_jax.storage import metric_sinks

PACKAGE = sorted(Path("mae_jax").rglob("*.py"))
EVERYTHING = PACKAGE + [path for name in ("tests", "configs", "examples") for path in sorted(Path(name).rglob("*.py"))]


def modules(path: Path) -> set[str]:
    """Returns the full names of all that the file imports, wherever in it, with what it takes from each."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imported(path: Path) -> set[str]:
    """Returns the top-level names of all packages that the file imports."""
    return {name.split(".")[0] for name in modules(path)}


@pytest.mark.parametrize(("library", "home"), [
    ("flax", "mae_jax/models"), ("tensorflow", "mae_jax/data"), ("tensorflow_datasets", "mae_jax/data"),
    ("orbax", "mae_jax/storage/checkpoint.py")])
def test_a_library_is_imported_in_its_own_room_only(library, home):
    users = {path for path in PACKAGE if library in imported(path)}
    assert users
    assert {path for path in users if not path.is_relative_to(home)} == set()


JSON_READERS = ("mae_jax/runtime/bounded_json.py", "mae_jax/plugins.py")  # the second, what installers wrote


TORCH_READER = Path("mae_jax/storage/torch_file.py")
# A run and the processes that it starts pickle for each other, through sockets that nobody else has.
OWN_PROCESSES = (Path("mae_jax/data/readers/process_pool.py"), Path("mae_jax/data/readers/worker_process.py"))


def test_nothing_that_is_read_is_executed():
    """No pickles, no evaluated texts; NumPy's files are opened where objects in them are refused, and JSON is read
    where its depth and numbers are bounded."""
    for path in PACKAGE:
        assert not imported(path) & {"marshal", "shelve", "dill", "cloudpickle"}, path
        if path == TORCH_READER:  # which runs a pickle that can name nothing but what the reader knows
            uses = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text()))
                    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"}
            assert uses == {"pickle.Unpickler"}
            assert "def find_class" in path.read_text()
        elif path in OWN_PROCESSES:
            called = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text()))
                      if isinstance(node, ast.Call)}
            assert not {name for name in called if name == "open" or name.endswith((".open", ".read_bytes"))}, path
        else:
            assert not imported(path) & {"pickle", "multiprocessing"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("eval", "exec", "compile", "__import__"), f"{path}:{node.lineno}"
            assert called not in ("json.loads", "json.load") or str(path) in JSON_READERS, f"{path}:{node.lineno}"
            assert called != "np.load" or path == Path("mae_jax/storage/npz.py"), f"{path}:{node.lineno}"


def test_a_home_is_looked_up_where_all_paths_are_read():
    assert [str(path) for path in PACKAGE if "expanduser" in path.read_text()] == ["mae_jax/storage/paths.py"]


LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def test_the_layers_of_pyproject_are_kept():
    """Imports within functions count, those for type checkers alone do not."""
    done = subprocess.run([sys.executable, "-c", LINT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[done.stdout.find("Contracts"):]


def test_no_modules_import_each_other_in_a_circle():
    graph = grimp.build_graph("mae_jax", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert sum(map(len, imports.values())) > 400
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_what_registries_import_by_name_is_where_the_layers_have_it():
    """A linter sees no imports by name: each table imports from its own package, which its package may import."""
    assert {module.rpartition(".")[0] for module in registry.MODULES.values()} == {"mae_jax.data.sources"}
    assert {target.rpartition(".")[0] for target in methods.TABLE.values()} == {"mae_jax.methods"}
    assert {target.rpartition(".")[0] for target in OPTIMIZERS.values()} == {"mae_jax.training"}  # which asks for it
    assert {target.rpartition(".")[0] for target in metric_sinks.SINKS.values()} == {"mae_jax.storage"}
    assert {target.rpartition(".")[0] for target in layouts.LAYOUTS.values()} == {"mae_jax.interop"}
    assert all(command.module.startswith("mae_jax.commands.") for command in COMMANDS.values())


OUTSIDE = [path for name in ("tests", "benchmarks", "studies", "examples") for path in Path(name).rglob("*.py")]


def test_no_module_imports_one_that_defines_a_commands_flags():
    """Two commands define the same flag, so that a process can import one of them: the entries do, by the verb."""
    with_flags = {".".join(path.with_suffix("").parts) for path in PACKAGE
                  if path.is_relative_to("mae_jax/commands") and "= flags.DEFINE_" in path.read_text()}
    assert with_flags == {command.module for command in COMMANDS.values()}
    importers = {str(path) for path in PACKAGE + OUTSIDE if modules(path) & with_flags}
    assert importers == {"mae_jax/main.py"}  # `python -m mae_jax.main`


def test_the_package_has_a_dozen_files_in_its_root_at_most():
    assert len(list(Path("mae_jax").glob("*.py"))) <= 12


OWN_FOLDERS = {  # not of a package
    "helpers", "faults", "multidevice", "golden", "gcs", "configs", "examples", "launch_tpu", "studies", "docs"}


def test_folders_of_tests_are_those_of_the_package():
    folders = {path.parent.relative_to("tests") for path in Path("tests").rglob("*_test.py")}
    assert {str(path) for path in folders
            if path.parts and path.parts[0] not in OWN_FOLDERS and not (Path("mae_jax") / path).is_dir()} == set()
    packages = {path.parent.name for path in Path("mae_jax").glob("*/__init__.py")}
    assert packages - {path.parts[0] for path in folders if path.parts} == set()


def functions(path: Path) -> list[tuple[str, int]]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return [(f"{path}:{node.name}", node.end_lineno - node.lineno + 1) for node in nodes]


def test_no_function_is_longer_than_60_lines_but_the_table_of_defaults():
    long = {name: lines for path in EVERYTHING for name, lines in functions(path) if lines > 60}
    assert set(long) <= {"mae_jax/config/__init__.py:default"}


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
NEED = {"mae_jax.data." + name for name in (
    "tensorflow_cpu", "readers.record_stream", "readers.stream_batches", "sources.tfds", "sources.tfrecord",
    "transforms.graph")}
for module in pkgutil.walk_packages(mae_jax.__path__, "mae_jax."):
    if module.name not in NEED | {"mae_jax.__main__"}:
        flags.FLAGS._flags().clear()  # every command defines its own
        importlib.import_module(module.name)
"""


@pytest.mark.slow
def test_all_but_the_readers_of_records_imports_without_tensorflow():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TENSORFLOW], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_fast_tier_and_the_rest_are_all_tests():
    """`python -m pytest` leaves out what has any marker of a tier, and .ci/run then runs all that has one."""
    options = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    tiers = [line.split(":")[0] for line in options["markers"]]
    assert options["addopts"][-2:] == ["-m", " and ".join(f"not {tier}" for tier in tiers)]
    assert f'-m "{" or ".join(tiers)}"' in Path(".ci/run").read_text()


def test_the_page_of_config_fields_is_what_the_source_says():
    done = subprocess.run([sys.executable, "docs/make_configuration.py", "--check"], capture_output=True, text=True,
                          timeout=120, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr
