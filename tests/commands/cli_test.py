"""A user's mistake ends with one clear line and exit code 2, our bugs with a traceback and 1."""

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
from absl import flags
from etils import epath
from ml_collections import config_flags

from mae_jax.commands import cli
from mae_jax.config import validate
from mae_jax.errors import GuardError, UserError
from mae_jax.runtime import discovery
from mae_jax.training import loop, workdir
from tests.helpers.tiny import tiny_config


def main(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mae_jax.main", *args], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(("args", "line"), [
    (["--config=configs/quickstart.py", "--workdir={}/run", "--config.optim.lrr=1"],
     "error: unknown config field 'lrr'; did you mean 'lr'?"),
    (["--config=configs/quikstart.py", "--workdir={}/run"],
     "error: cannot read the config file configs/quikstart.py: no such file or directory; did you mean 'quickstart'?"),
    (["--config=quikstart:runlocal", "--workdir={}/run"],
     "error: unknown recipe 'quikstart'; did you mean 'quickstart'?"),
    (["--config=configs/quickstart.py"], "error: --workdir must be given; --help shows an example"),
    (["--config=configs/quickstart.py:runlocal", "--workdir={}/run", "--config.data.image_size=(30,32)"],
     "error: data.image_size: height 30 is not a multiple of the patch size 4; nearest: 28 and 32"),
])
def test_a_mistake_on_the_command_line_ends_with_one_line_and_2_and_leaves_nothing(args, line, tmp_path):
    done = main(*(arg.format(tmp_path) for arg in args))
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_help_exits_0_and_shows_a_command_that_works():
    done = main("--help")
    assert done.returncode == 0
    assert "mae_jax train --config=quickstart --workdir=runs/quickstart" in done.stdout
    assert "--workdir" in done.stdout.split("Flags:")[1]


def line_of(monkeypatch, *args: str) -> str:
    """Returns what the command says to these flags."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "recipe", flag_values=values)
    flags.DEFINE_string("workdir", "", "folder", flag_values=values)
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "mode", flag_values=values)
    argv = ["main", *args]
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the recipe of the test before
    monkeypatch.setattr("sys.argv", argv)  # where ml_collections looks for the overrides
    with pytest.raises(Exception) as error:  # noqa: PT011 - of many types: what is tested is that all become one line
        values(argv)
    return cli._one_line(error.value)


RECIPE = "--config=configs/quickstart.py"


@pytest.mark.parametrize(("args", "words"), [
    ([RECIPE, "--config.batch_size=abc"], ["--config.batch_size=abc", "'abc'"]),
    ([RECIPE, "--config.optm.lr=1"], ["unknown config field 'optm'; did you mean 'optim'?"]),
    ([RECIPE, "--config.data.colour=rand"], ["unknown config field; data.colour is data.color since mae_jax 0.2.0"]),
    ([RECIPE, "--config.checkpoint.best", "top1"], ["checkpoint.best is checkpoint.best_metric since mae_jax 0.2.0"]),
    (["--config=configs/splitmask_small.py", "--noconfig.method.normalise"], ["method.normalise is method.normalize"]),
    ([RECIPE, "--config.batch_size.x=1"], ["batch_size.x"]),
    ([RECIPE, "--config.train=3"], ["--config.train=3"]),
    ([RECIPE, "--workdr=x"], ["Unknown command line flag 'workdr'", "workdir"]),
    ([RECIPE, "--mode=tran"], ["--mode=tran", "train|eval"]),
    ([RECIPE + ":runlocl"], ["unknown config argument 'runlocl'; did you mean 'runlocal'?"]),
    (["--config=configs/quikstart.py", "--config.seed=1"], ["did you mean 'quickstart'?"]),
    (["--config=configs/nope.py", "--config.seed=1"],
     ["cannot read the config file configs/nope.py", "known: ", " more"]),
])
def test_flags_that_cannot_be_read_are_named(monkeypatch, args, words):
    line = line_of(monkeypatch, *args)
    assert "\n" not in line
    assert len(line) < 250
    for word in words:
        assert word in line


@pytest.mark.parametrize(("body", "line"), [
    ("def get_config(:", "the config file does not load: SyntaxError: invalid syntax (mine.py, line 1)"),
    ("def get_config():\n    raise ValueError('boo')", "the config file does not load: ValueError: boo"),
    ("import no_such_package", "the config file does not load: ModuleNotFoundError: No module named 'no_such_package'"),
    ("from mae_jax.config import default\n\n\ndef get_config():\n    config = default()\n    config.optim.lrr = 3",
     "unknown config field 'lrr'; did you mean 'lr'?"),
    ("from mae_jax.config import default\n\n\ndef get_config():\n    c = default()\n    c.checkpoint.best = 'top1'",
     "unknown config field; checkpoint.best is checkpoint.best_metric since mae_jax 0.2.0"),
    ("x = 1", "no attribute 'get_config'"),
])
def test_a_config_file_of_the_users_own_that_does_not_load_is_explained(monkeypatch, tmp_path, body, line):
    (tmp_path / "mine.py").write_text(body + "\n")
    found = line_of(monkeypatch, f"--config={tmp_path / 'mine.py'}")
    assert "\n" not in found
    assert line in found


def test_a_config_file_that_ends_the_process_is_a_mistake(tmp_path):
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(0)\n")
    done = subprocess.run([sys.executable, "-m", "mae_jax", "train", f"--config={tmp_path / 'mine.py'}"],
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "ends the process" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--help", "--helpfull", "--helpshort", "--helpxml", "--config=quickstart --help",
                                  "--version"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_that_nobody_reads_ends_help_without_a_word(flag, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "mae_jax.main", *flag.split()], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_flag_files_give_flags_and_one_that_cannot_be_read_is_a_mistake(tmp_path):
    (tmp_path / "flags").write_text(f"--config=quickstart\n--workdir={tmp_path / 'run'}\n"
                                    "--config.data.image_size=(30,32)\n")
    assert "height 30" in main(f"--flagfile={tmp_path / 'flags'}").stderr
    (tmp_path / "bytes").write_bytes(b"\xab\xcd")
    for name in ("nope", ".", "bytes"):
        done = main(f"--flagfile={tmp_path / name}")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(("recipe", "name"), [("quickstart", "dino"), ("vit_s_dino", "mae"), ("moce", "mae")])
def test_another_method_over_a_recipe_is_refused_by_what_differs(recipe, name):
    config = importlib.import_module(f"configs.{recipe}").get_config()
    config.unlock()
    config.method.name = name
    with pytest.raises(UserError, match=rf"^method\.name='{name}' .*method\.\w+ is of only one"):
        validate(config)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_libtpu_without_a_tpu_is_not_heard(monkeypatch):
    for name in ("JAX_PLATFORMS", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.delenv(name, raising=False)
    code = "import jax; from mae_jax.commands import cli; cli.guarded(lambda: print(jax.devices()[0].platform) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))),
                    reason="needs JAX's CUDA plugin")
@pytest.mark.skipif(any(map(os.path.exists, discovery.NVIDIA)), reason="needs a machine without a GPU")
def test_the_cuda_plugin_without_a_gpu_is_not_heard(monkeypatch):
    for name in ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"):
        monkeypatch.delenv(name, raising=False)
    code = "import jax; from mae_jax.commands import cli; cli.guarded(lambda: print(jax.devices()[0].platform) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("cpu\n", "")


def raises(error):
    def command():
        raise error

    return command


@pytest.mark.usefixtures("_restored_logging")
@pytest.mark.parametrize(("command", "code", "text"), [
    (lambda: 75, 75, ""),
    (raises(UserError("the folder is empty")), 2, "error: the folder is empty\n"),
    (raises(GuardError("10 steps in a row")), 3, "stopped: 10 steps in a row\n"),
])
def test_the_exit_code_says_how_it_ended(command, code, text, capsys):
    assert cli.guarded(command) == code
    assert capsys.readouterr().err == text


@pytest.mark.usefixtures("_restored_logging")
def test_a_bug_of_ours_shows_its_traceback_and_exits_1(capsys):
    assert cli.guarded(raises(ZeroDivisionError("oh"))) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.endswith("this is a bug in mae_jax; please report it with the lines above\n")


@pytest.mark.usefixtures("_restored_logging")
@pytest.mark.parametrize(("fields", "words"), [
    ({"data.source": "folder", "data.path": "/no/such/folder"}, ["/no/such/folder"]),
    ({"data.source": "foldr"}, ["unknown data.source 'foldr'", "did you mean 'folder'?"]),
    ({"mesh.data": 3}, ["mesh.data=3, mesh.fsdp=1, mesh.tensor=1 does not multiply to 1 device;"]),
    ({"train.duration": "0 steps"}, ["train.duration='0 steps' is less than one step"]),
    ({"method.masking": "grid", "data.image_size": (20, 16)}, ["5 x 4", "nearest: 4 x 4 or 6 x 4"]),
    ({"init_from": "/no/such/run"}, ["/no/such/run"]),
])
def test_a_mistake_that_only_training_can_see_ends_with_one_line_and_2(fields, words, capsys, tmp_path):
    config = tiny_config(fields)
    assert cli.guarded(lambda: loop.train(config, str(tmp_path / "run"))) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_restored_logging")
def test_a_workdir_of_another_config_is_refused(capsys, tmp_path):
    decided = {"data.range": "0,65535"}  # as the data decide before a run is recorded
    workdir.record(epath.Path(tmp_path), tiny_config(decided))
    assert cli.guarded(lambda: loop.train(tiny_config({"optim.lr": 0.5, **decided}), str(tmp_path))) == 2
    assert "error: the workdir belongs to another config; optim.lr: 0.05 -> 0.5." in capsys.readouterr().err


@pytest.mark.usefixtures("_restored_logging")
def test_evaluating_what_is_no_workdir_or_has_no_checkpoint_is_refused(capsys, tmp_path):
    assert cli.guarded(lambda: loop.evaluate(str(tmp_path))) == 2
    assert "not a workdir of mae_jax" in capsys.readouterr().err
    workdir.record(epath.Path(tmp_path), tiny_config())
    assert cli.guarded(lambda: loop.evaluate(str(tmp_path))) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
