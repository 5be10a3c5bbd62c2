"""`mae_jax VERB`: verbs, --version, and a --help that is fast and survives a pipe that is closed."""

import subprocess
import sys

import pytest

from mae_jax import __version__
from mae_jax.__main__ import COMMANDS

RUN = [sys.executable, "-m", "mae_jax"]
HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "tensorflow_datasets")
# Runs the command as it is run, and at the end says what it imported.
WATCHED = f"""
import atexit, os, runpy, sys
def check():
    loaded = [name for name in {HEAVY} if name in sys.modules]
    sys.stdout.flush()
    os._exit(9 if loaded else 0)
atexit.register(check)
sys.argv[1:1] = []
runpy.run_module("mae_jax", run_name="__main__", alter_sys=True)
"""


def run(*args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*RUN, *args], capture_output=True, text=True, timeout=120, **options)


def watched(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WATCHED, *args], capture_output=True, text=True, timeout=120)


def test_what_watches_the_imports_sees_them():
    probe = WATCHED.replace("sys.argv[1:1] = []", "import jax")
    assert subprocess.run([sys.executable, "-c", probe, "--version"], capture_output=True, timeout=120).returncode == 9


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_of_a_verb_shows_example_flags_and_the_recipes_fields_and_imports_no_jax(verb):
    done = watched(verb, "--help", "--config=quickstart:runlocal", "--config.optim.lr=0.125")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    usage, listed = done.stdout.split("\nFlags:\n")
    listed, shown = listed.split("Fields of this recipe")
    assert f"  mae_jax {'train' if verb == 'replay' else verb} --" in usage
    assert "--config: recipe by name or path" in listed
    assert "  optim.lr=0.125 " in shown
    assert "  train.duration='2 steps'" in shown


@pytest.mark.parametrize("args", [["--version"], ["--help"], [], ["train", "--version"], ["plan", "--help"]])
def test_version_and_help_import_no_jax(args):
    done = watched(*args)
    assert done.returncode == 0, done.stderr
    if "--version" in args:
        assert done.stdout == f"mae_jax {__version__}\n"
    elif args == ["plan", "--help"]:
        assert "--config=quickstart --help" in done.stdout
        assert "vit_l_mae" in done.stdout
    else:
        assert "mae_jax train --config=quickstart" in done.stdout
        assert all(f"  {verb:<10}{command.about}\n" in done.stdout for verb, command in COMMANDS.items())


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--help", "train --help", "train --help --config=quickstart", "--version"])
@pytest.mark.parametrize("to", ["| head -c 1", "| true", ">&-", ">/dev/full"])
def test_help_survives_a_pipe_that_is_closed(command, to):
    line = f"set -o pipefail; {' '.join(RUN)} {command} {to}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == ""


def test_an_unknown_verb_is_a_mistake_of_one_line():
    done = run("trian", "--config=quickstart")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown command 'trian'; did you mean 'train'?")
    assert done.stderr.count("\n") == 1


def test_help_with_a_mistake_in_the_recipe_says_so():
    done = run("train", "--help", "--config=quikstart")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown recipe 'quikstart'; did you mean 'quickstart'?")
