"""The loop: going on, stopping by the guard, starting from other parameters, failing saves."""

import itertools
import json
import os
import re
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from mae_jax import errors
from mae_jax.data.sources import folder as sources_folder
from mae_jax.errors import GuardError, UserError
from mae_jax.evals import context
from mae_jax.param_tree import flatten
from mae_jax.rng import stream_key
from mae_jax.runtime.signals import SignalHandler
from mae_jax.storage.checkpoint import load_params
from mae_jax.storage.metric_writer import MetricWriter
from mae_jax.training import loop, replay
from mae_jax.training import run as training_run
from mae_jax.training.step_logger import StepLogger
from tests.helpers.tiny import tiny_config, tiny_supervised


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_finished_run_stays_and_a_longer_duration_goes_on(tmp_path, capsys):
    assert loop.train(tiny_config(), str(tmp_path)) == 0
    before = (tmp_path / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert loop.train(tiny_config(), str(tmp_path)) == 0
    assert "is finished: step 6 of 6" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert loop.train(tiny_config({"train.duration": "7 steps"}), str(tmp_path)) == 0
    steps = [row["step"] for row in rows(tmp_path) if "train/loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in rows(tmp_path) if "eval/loss" in row] == [0, 3, 6, 7]
    assert json.loads((tmp_path / "config.json").read_text())["config"]["train"]["duration"] == "7 steps"
    capsys.readouterr()
    assert loop.evaluate(str(tmp_path)) == 0
    assert "evaluation at step 7" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path) if "eval/loss" in row] == [0, 3, 6, 7]


@pytest.mark.slow
def test_what_is_left_of_a_finished_run_without_its_checkpoints_is_no_fresh_start(tmp_path):
    assert loop.train(tiny_config(), str(tmp_path)) == 0
    before = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"finished 6 steps.* no checkpoint"):
        loop.train(tiny_config({"train.duration": "7 steps"}), str(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_other_data_at_a_resume_are_told_and_other_classes_of_a_classifier_refused(tmp_path, caplog):
    caplog.set_level("INFO", "mae_jax")
    for name in ("ant", "bee"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    fields = {"data.source": "folder", "data.path": str(tmp_path / "pictures"), "data.eval_split": "",
              "train.duration": "2 steps", "batch_size": 8}
    configs = {"mae": tiny_config(fields), "supervised": tiny_config(fields | {"method.classes": 0}, "supervised")}
    for name, config in configs.items():
        assert loop.train(config, str(tmp_path / name)) == 0
    (tmp_path / "pictures" / "ant").rename(tmp_path / "pictures" / "cat")
    (tmp_path / "pictures" / "bee" / "7.png").unlink()
    sources_folder.folder_listing.files.cache_clear()
    with configs["mae"].unlocked():
        configs["mae"].train.duration = "3 steps"
    assert loop.train(configs["mae"], str(tmp_path / "mae")) == 0
    assert "changed since the run began: images to train on: 16 -> 15" in caplog.text
    assert "changed since the run began: classes: 2 -> 2 (-ant, +cat)" in caplog.text
    for go_on in (loop.train, lambda config, folder: loop.evaluate(folder)):
        with pytest.raises(UserError, match=r"classes: 2 -> 2 \(-ant, \+cat\)"):
            go_on(configs["supervised"], str(tmp_path / "supervised"))


@pytest.mark.slow
def test_a_workdir_that_is_removed_meanwhile_is_made_whole_again(tmp_path, monkeypatch, caplog):
    push = StepLogger.record

    def remove(self, done, *args):
        if done == 4:
            (tmp_path / "run").rename(tmp_path / "gone")
        push(self, done, *args)

    monkeypatch.setattr(StepLogger, "record", remove)
    config = tiny_config({"eval.every": "", "checkpoint.every": "2 steps"})
    assert loop.train(config, str(tmp_path / "run")) == 0
    assert "lock had been removed, and is there again" in caplog.text
    assert load_params(tmp_path / "run")
    assert loop.evaluate(str(tmp_path / "run")) == 0


@pytest.mark.slow
def test_a_verdict_of_a_guard_stands_where_it_cannot_be_written(tmp_path, caplog):
    (tmp_path / "guard_2.json").mkdir(parents=True)
    config = tiny_config({"optim.lr": 1e38, "guard.max_nonfinite": 1, "train.duration": "20 steps"})
    with pytest.raises(GuardError, match="step 2"):
        loop.train(config, str(tmp_path))
    assert "cannot write" in caplog.text
    assert (tmp_path / "checkpoints" / "3").is_dir()
    with pytest.raises(UserError, match=r"--step=4 .* step 3"):
        replay.replay(str(tmp_path), 4)


@pytest.mark.slow
def test_gradients_that_stay_not_finite_stop_the_run_save_it_and_name_the_replay(tmp_path, capsys):
    config = tiny_config({"optim.lr": 1e38, "guard.max_nonfinite": 2, "train.duration": "20 steps", "eval.every": ""})
    with pytest.raises(GuardError, match=r"2 steps .* step \d+; .*mae_jax replay") as error:
        loop.train(config, str(tmp_path))
    assert f"--workdir={tmp_path}" in str(error.value)
    saved = {int(folder.name) for folder in (tmp_path / "checkpoints").iterdir()}
    step = int(re.search(r"--step=(\d+)", str(error.value))[1])
    assert max(saved) > step
    found = json.loads((tmp_path / f"guard_{step}.json").read_text())
    assert [line["step"] for line in found["steps"]] == [step - 1, step]
    assert not np.isfinite(float(found["loss"])) or not np.isfinite(float(found["grad_norm"]))
    for line in found["steps"]:
        batch = next(training_run.prepare(config, tmp_path).inputs.train(line["step"]))
        assert line["ids"] == batch["id"].tolist()
        assert line["key"] == jax.random.key_data(stream_key(config.seed, line["step"], "loss")).tolist()
    assert [row["train/bad_steps"] for row in rows(tmp_path) if "train/loss" in row][-2:] == [0, 1]
    capsys.readouterr()
    assert replay.replay(str(tmp_path), step) == 0
    out = capsys.readouterr().out
    assert "parameters whose gradient is not finite: " in out
    assert "not finite: none" not in out


@pytest.mark.slow
def test_the_state_that_a_guard_saves_is_the_one_with_which_the_step_that_is_named_began(tmp_path, monkeypatch):
    config = tiny_config({"guard.max_nonfinite": 1, "train.duration": "12 steps", "eval.every": "",
                          "data.eval_split": "", "checkpoint.every": "1 steps", "checkpoint.keep_last": 20})
    batches, bad = loop.device_batches, 4

    def poisoned(run, start):
        for number, batch in enumerate(batches(run, start), start):
            yield batch | {"patches": batch["patches"] * jnp.where(number == bad, jnp.nan, 1.0)}

    monkeypatch.setattr(loop, "device_batches", poisoned)
    with pytest.raises(GuardError, match=f"step {bad};"):
        loop.train(config, str(tmp_path))
    steps = sorted(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir())
    assert steps == [1, 2, 3, 4, 5]  # no step was begun after it
    before, saved = (load_params(tmp_path / "checkpoints" / str(step)) for step in (bad, bad + 1))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, saved)))


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing_but_the_times_on_record(tmp_path, monkeypatch):
    assert loop.train(tiny_config(), str(tmp_path / "still")) == 0
    clock, jumps = time.time, itertools.cycle([0.0, 60.0, -60.0])  # orbax limits its waits by this clock
    monkeypatch.setattr(time, "time", lambda: clock() + next(jumps))
    assert loop.train(tiny_config({"guard.stall_seconds": 600.0}), str(tmp_path / "jumps")) == 0
    timed = {"time", "train/images_per_sec", "train/data_wait", "train/mfu", "eval/seconds"}
    still, jumped = ([{name: value for name, value in row.items() if name not in timed} for row in rows(tmp_path / run)]
                     for run in ("still", "jumps"))
    assert still == jumped
    speeds = [row.get("train/images_per_sec") for row in rows(tmp_path / "jumps")]
    assert all(0 < speed < 1e6 for speed in speeds if speed is not None)
    assert sum(speed is not None for speed in speeds) > 2


@pytest.mark.slow
def test_init_from_takes_the_parameters_of_another_run(tmp_path, caplog):
    first, second = tmp_path / "first", tmp_path / "second"
    config = tiny_config({"data.eval_split": "", "train.duration": "3 steps"})
    assert loop.train(config, str(first)) == 0
    fields = {"data.eval_split": "", "train.duration": "1 steps", "init_from": str(first), "seed": 1,
              "optim.warmup": "1 steps"}  # so that the first step's rate is 0
    with caplog.at_level("INFO", "mae_jax"):
        assert loop.train(tiny_config(fields), str(second)) == 0
    assert "init_from" in caplog.text
    assert "new: none; left over: none" in caplog.text
    ours, theirs = (flatten(load_params(folder)) for folder in (second, first))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    assert not any("eval/loss" in row for row in rows(second))


@pytest.mark.slow
def test_a_last_save_that_fails_is_the_users_to_mend_and_the_run_goes_on_from_the_one_before(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        real = ocp.AsyncCheckpointer.save
        patch.setattr(ocp.AsyncCheckpointer, "save",
                      lambda self, path, **items: (full if path.name == "6" else real)(self, path, **items))
        patch.setattr(ocp.AsyncCheckpointer, "close", full)  # as orbax does it after a failed save
        with pytest.raises(UserError, match=r"step 6 .*No space.* step 3"):
            loop.train(tiny_config(), str(tmp_path))
    assert not (tmp_path / "DONE").exists()
    assert loop.train(tiny_config(), str(tmp_path)) == 0
    assert [row["step"] for row in rows(tmp_path) if "train/loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_last_save_that_fails_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    real, tried = ocp.AsyncCheckpointer.save, []

    def save(self, path, **items):
        tried.append(path.name)
        if tried.count("6") == 1:
            tried.append("failed")
            raise OSError(28, "No space left on device")
        real(self, path, **items)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", save)
    assert loop.train(tiny_config(), str(tmp_path)) == 0
    assert tried == ["3", "6", "failed", "6"]
    assert (tmp_path / "DONE").exists()


def test_a_batch_on_the_devices_is_what_the_input_gives(tmp_path):
    run = training_run.prepare(tiny_config(), tmp_path)
    batches = training_run.device_batches(run, 2)
    for wanted, found in zip(run.inputs.train(2), (next(batches) for _ in range(3)), strict=False):
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            np.testing.assert_array_equal(jax.device_get(found[name]), value)


@pytest.mark.slow
def test_too_many_bad_pictures_stop_the_run_with_their_names_but_not_before_100_were_seen(tmp_path):
    run = training_run.prepare(tiny_config({"guard.max_bad_fraction": 0.2}), tmp_path)
    run.inputs.bad.append("cats/7.jpg: no end marker")
    log = StepLogger(run, MetricWriter(tmp_path, 0, sinks=("pictures",)))
    metrics = {name: (np.float32(value), np.float32(1)) for name, value in
               {"loss": 1, "lr": 1, "grad_norm": 1, "bad_steps": 0, "replaced": 2}.items()}  # 2 of 8 images
    ids = np.arange(8)
    for done in range(1, 14):
        log.record(done, metrics, ids)  # handles the 12 before: 96 images
    with pytest.raises(GuardError, match=r"26 of 104 .*0\.2: cats/7\.jpg"):
        log.record(14, metrics, ids)


@pytest.mark.slow
def test_a_workdir_of_many_devices_is_looked_at_on_one(tmp_path, capsys):
    config = tiny_config()
    assert loop.train(config, str(tmp_path)) == 0
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["config"]["mesh"] |= {"data": 4, "tensor": 2, "reduce": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    capsys.readouterr()
    assert loop.evaluate(str(tmp_path)) == 0
    assert "evaluation at step 6" in capsys.readouterr().out
    assert replay.replay(str(tmp_path), -1) == 0


def test_a_classifier_is_not_reported_on_what_it_is_trained_on(tmp_path):
    splits = {"data.source": "photo_crops", "data.train_split": "test[:64]", "data.eval_split": "test"}
    with pytest.raises(UserError, match=r"data\.train_split='test\[:64\]' .*data\.eval_split"):
        loop.train(tiny_supervised(splits | {"method.classes": 17}), str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mixedae", "splitmask", "beit", "dino"])
def test_every_method_is_replayed(tmp_path, capsys, method):
    config = tiny_config({"train.duration": "2 steps", "eval.every": "", "data.eval_split": ""}, method)
    assert loop.train(config, str(tmp_path)) == 0
    assert replay.replay(str(tmp_path), -1) == 0
    assert "examples whose loss is not finite: none" in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_whose_pictures_were_mixed_is_replayed_picture_by_picture(tmp_path, capsys):
    fields = {"method.mixup": 0.8, "method.mix_group": 4, "data.eval_split": "", "train.duration": "2 steps"}
    data = {"data.source": "photo_crops", "data.train_split": "train[:64]", "method.classes": 17}
    assert loop.train(tiny_supervised(fields | data), str(tmp_path)) == 0
    assert replay.replay(str(tmp_path), 1) == 0
    assert "examples whose loss is not finite: none" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["missing", "empty", "file.safetensors"])
def test_an_init_from_that_is_none_is_refused_by_a_dry_run_too(tmp_path, monkeypatch, source):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_bytes(b"no weights")
    monkeypatch.setattr("mae_jax.training.train_step.TrainStep.compile", None)  # is not reached
    with pytest.raises(UserError, match=re.escape(str(tmp_path / source))):
        loop.dry_run(tiny_config({"init_from": str(tmp_path / source)}), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("entry", [loop.dry_run, loop.train])
def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(tmp_path, monkeypatch, entry):
    monkeypatch.setattr("mae_jax.training.train_step.TrainStep.compile", None)
    monkeypatch.setattr("mae_jax.storage.disk.free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match=r"disk has 0\.0 MB left"):
        entry(tiny_config(), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mae", "mixedae", "dino", "supervised"])
def test_the_pass_of_evaluations_is_traced_once_ahead_and_not_again(tmp_path, monkeypatch, method):
    traced, measure = [], context.measure
    monkeypatch.setattr(context, "measure", lambda *args: traced.append(threading.current_thread().name)
                        or measure(*args))
    config = tiny_config({"data.source": "photo_crops", "data.eval_split": "test[:16]", "eval.max_examples": 16,
                          "train.duration": "2 steps", "eval.every": "1 steps",
                          **({"method.classes": 0} if method == "supervised" else {})}, method)
    assert loop.train(config, str(tmp_path)) == 0
    assert [name.partition("_")[0] for name in traced] == ["compile"]


@pytest.mark.slow
@pytest.mark.parametrize(("alone", "code"), [(True, errors.FINISHED), (False, errors.STOPPED)])
def test_a_signal_after_the_last_step_ends_the_series_and_the_run_is_finished(tmp_path, monkeypatch, alone, code):
    save, stoppers = loop.Checkpoints.save, []
    monkeypatch.setattr(loop, "SignalHandler", lambda: stoppers.append(SignalHandler()) or stoppers[-1])

    def signalled(self, step, state) -> None:
        save(self, step, state)
        os.kill(os.getpid(), signal.SIGTERM)
        while not stoppers[-1].requested:
            time.sleep(0.01)

    monkeypatch.setattr(loop.Checkpoints, "save", signalled)
    config = tiny_config({"eval.every": "", "train.duration": "2 steps", "checkpoint.every": "2 steps"})
    assert loop.train(config, str(tmp_path), alone) == code
    assert (tmp_path / "DONE").read_text() == "2\n"
    assert loop.train(config, str(tmp_path), alone) == errors.FINISHED
