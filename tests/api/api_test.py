"""The Python surface: light to import, without TensorFlow, and a guest in the process that calls it."""

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import jax
import numpy as np
import pytest

import mae_jax
from mae_jax import api
from mae_jax.runtime import signals
from mae_jax.storage import leases
from tests.helpers.stored import STEP, store_images, store_run
from tests.helpers.tiny import tiny_config, tiny_params, tiny_supervised

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 30, 3), dtype=np.uint8)
FAST = {"data.source": "photo_crops", "data.train_split": "train[:64]", "train.duration": "4 steps", "eval.every": "",
        "data.eval_split": "", "checkpoint.every": "2 steps"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A classifier of the images in `data` beside it."""
    folder = tmp_path_factory.mktemp("api")
    store_images(folder / "data", broken=1)
    config = tiny_supervised({"data.source": "folder", "data.path": str(folder / "data"), "method.classes": 0})
    return store_run(folder / "run", config, ("a", "b", "c"), tiny_params(tiny_supervised()))


def test_all_names_are_there_and_documented():
    for name in api.__all__:
        assert getattr(mae_jax, name) is getattr(api, name)
        assert name in dir(mae_jax)
        assert getattr(api, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = mae_jax.laod


LIGHT = """
import sys
import mae_jax
assert not {"jax", "flax", "tensorflow", "absl", "numpy"} & set(sys.modules), sys.modules.keys()
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = sys.modules["clu"] = None
import mae_jax.api
from absl import flags
before = set(flags.FLAGS)
"""
USED = LIGHT + """
import numpy as np
encoder = mae_jax.load(sys.argv[1])
print(encoder(np.zeros((5, 7, 3), np.uint8)).shape)
print(mae_jax.predict(encoder, sys.argv[2] + "/a").__len__())
print(mae_jax.embed(encoder, sys.argv[2] + "/../features.parquet", images=sys.argv[2]).images)
assert set(flags.FLAGS) == before
"""


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_needed_and_tensorflow_never(run):
    done = subprocess.run([sys.executable, "-c", USED, str(run), str(run.parent / "data")], capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["(1, 32)", "5", "15"]


def test_importing_the_package_imports_nothing_else():
    done = subprocess.run([sys.executable, "-c", LIGHT.split("sys.modules[")[0]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_load_embed_and_predict(run, tmp_path):
    encoder = mae_jax.load(run, batch_size=4)
    assert encoder.step == STEP
    assert encoder([PIXELS, PIXELS[..., 0]]).shape == (2, 32)
    found = mae_jax.embed(encoder, tmp_path / "a.npz", images=run.parent / "data")
    assert (found.images, found.unreadable_count) == (15, 1)
    said = mae_jax.predict(encoder, run.parent / "data", top_k=1)
    assert [each.name for each in said if each.error] == ["c/broken: 0.png"]
    one, = mae_jax.predict(encoder, PIXELS, top_k=2)
    assert len(one.classes) == len(one.probabilities) == 2
    assert [each.name for each in mae_jax.predict(encoder, str(run.parent / "data" / "a" / "00.png"))] == [
        str(run.parent / "data" / "a" / "00.png")]
    with pytest.raises(mae_jax.UserError, match="uint8"):
        mae_jax.predict(encoder, PIXELS / 255)
    with pytest.raises(mae_jax.UserError, match="names the images itself"):
        mae_jax.embed(encoder, tmp_path / "b.npz", images=run.parent / "data", split="train")


def test_recipes_by_name_with_fields():
    config = mae_jax.recipe("quickstart:runlocal", {"optim.lr": 1e-3, "data.image_size": (16, 16)})
    assert (config.optim.lr, config.data.image_size, config.batch_size) == (1e-3, (16, 16), 16)
    for name, fields, line in (("quickstrat", {}, "did you mean 'quickstart'"), ("./no.py", {}, "cannot read"),
                               ("quickstart", {"optim.lrr": 1}, r"'optim.lrr'; did you mean 'optim.lr'\?$"),
                               ("quickstart", {"data": {"path": "x"}}, "unknown config field 'data'"),
                               ("quickstart", {"optim.lr": "x"}, "optim.lr"),
                               ("quickstart", {"batch_size": 0}, "at least 1")):
        with pytest.raises(mae_jax.UserError, match=line):
            mae_jax.recipe(name, fields)


def test_recipes_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from mae_jax.config import default\ndef get_config():\n    return default()\n")  # no argument
    assert mae_jax.recipe(str(file), {"data.path": tmp_path}).data.path == str(tmp_path)
    for text, line in (("x = 1", r"has no get_config\(\)"), ("def", "no Python file: invalid syntax"),
                       ("def get_config():\n    return 5", r"has no get_config\(\)")):
        file.write_text(text)
        with pytest.raises(mae_jax.UserError, match=line):
            mae_jax.recipe(str(file))


def test_what_is_of_another_type_is_refused_in_one_line(run, tmp_path):
    with pytest.raises(mae_jax.UserError, match="config of type str"):
        mae_jax.train("quickstart", tmp_path / "run")
    with pytest.raises(mae_jax.UserError, match="top_k=-1"):
        mae_jax.predict(run, PIXELS, top_k=-1)
    with pytest.raises(mae_jax.UserError, match="images of type list"):
        mae_jax.embed(run, tmp_path / "a.npz", images=["a.png"])


@pytest.fixture
def guarded(monkeypatch):
    """Whoever ends the process, or changes a signal's handler, is told."""
    told: list[str] = []

    def ends(name: str) -> Any:
        return lambda *args: told.append(f"{name}{args}")

    monkeypatch.setattr(os, "_exit", ends("_exit"))
    monkeypatch.setattr(sys, "exit", ends("exit"))
    monkeypatch.setattr(signal, "signal", ends("signal"))
    monkeypatch.setattr(signal, "set_wakeup_fd", ends("set_wakeup_fd"))
    yield told
    assert told == []


@pytest.mark.slow
def test_training_leaves_the_process_to_its_owner(tmp_path, guarded, monkeypatch):
    """Its own handlers stay, an interrupt raises and the same call goes on, in a thread too."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    config, steps = tiny_config(FAST), []

    def seen(self, step):
        steps.append(step)
        assert {number: signal.getsignal(number) for number in before} == before
        if step == 3 and len(steps) == 3:
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(signals.NoSignals, "should_stop", seen)
    with pytest.raises(KeyboardInterrupt):
        mae_jax.train(config, tmp_path / "run")
    thread = threading.Thread(target=mae_jax.train, args=(config, tmp_path / "run"))
    thread.start()
    thread.join()
    assert steps == [1, 2, 3, 3, 4]
    assert mae_jax.train(config, tmp_path / "run") == str(tmp_path / "run")
    assert steps == [1, 2, 3, 3, 4]
    assert mae_jax.load(tmp_path / "run").step == 4
    assert jax.config.jax_compilation_cache_dir != str(tmp_path / "run" / "compiled")
    assert {thread.name for thread in threading.enumerate()} & {"watchdog", "stopper", "lease"} == set()


@pytest.mark.slow
def test_mistakes_and_guards_are_raised(tmp_path, guarded):
    store_images(tmp_path / "data", ("a",), count=2, broken=60)
    broken = tiny_config(FAST | {"data.source": "folder", "data.path": str(tmp_path / "data"),
                                 "data.train_split": "train", "train.duration": "40 steps",
                                 "checkpoint.every": "40 steps"})
    with pytest.raises(mae_jax.GuardError, match="max_bad_fraction"):
        mae_jax.train(broken, tmp_path / "broken")
    broken.data.path = str(tmp_path / "nowhere")
    with pytest.raises(mae_jax.UserError, match="is not a folder"):
        mae_jax.train(broken, tmp_path / "other")


@pytest.mark.slow
def test_a_workdir_that_is_lost_raises_and_ends_nothing(tmp_path, guarded, monkeypatch):
    device, lost = leases._device, []

    def moved(path):
        return device(path) + bool(lost)

    def seen(self, step):
        if step == 2:
            lost.append(step)
        return False

    monkeypatch.setattr(leases, "_device", moved)
    monkeypatch.setattr(signals.NoSignals, "should_stop", seen)
    with pytest.raises(mae_jax.GuardError, match="is not on the disk that it was on"):
        mae_jax.train(tiny_config(FAST), tmp_path / "run")
    monkeypatch.undo()
    mae_jax.train(tiny_config(FAST), tmp_path / "run")
    assert mae_jax.load(tmp_path / "run").step == 4
