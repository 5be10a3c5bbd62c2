"""When a run is evaluated, on what, and which checkpoint is the best."""

import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mae_jax.errors import UserError
from mae_jax.evals.evaluator import Evaluator
from mae_jax.param_tree import flatten
from mae_jax.storage import paths
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import loop
from mae_jax.training import run as training_run
from mae_jax.training.evaluation import BestCheckpoint, PeriodicEvaluation
from mae_jax.training.workdir import config_of
from tests.helpers.tiny import tiny_config, tiny_supervised

SPLITS = {"data.source": "photo_crops", "data.train_split": "train[:64]", "data.val_split": "train[3336:]",
          "data.eval_split": "test[:40]", "method.classes": 17}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run of six steps that is evaluated every third one, with averaged weights."""
    folder = tmp_path_factory.mktemp("evaluated")
    fields = {"checkpoint.best_metric": "loss", "optim.ema": 0.5, "eval.crop_ratio": (0.875, 1.0)}
    config = tiny_supervised(SPLITS | fields)
    assert loop.train(config, str(folder)) == 0
    return folder


@pytest.mark.slow
def test_the_validation_part_is_evaluated_on_the_way_and_the_test_split_once_at_the_end(evaluated):
    seen = {part: [line["step"] for line in lines(evaluated) if f"{part}/loss" in line] for part in ("val", "eval")}
    assert seen == {"val": [0, 3, 6], "eval": [6]}


@pytest.mark.slow
def test_the_end_reports_last_averaged_and_best_weights_and_other_crops(evaluated):
    last = next(line for line in lines(evaluated) if "eval/loss" in line)
    assert {"eval/top1", "eval/raw/top1", "eval/best/top1", "eval/best/raw/top1", "eval/crop_1/top1"} <= last.keys()
    assert last["eval/raw/loss"] != last["eval/loss"]


def test_what_was_best_by_k_nn_is_printed_and_figures_of_single_experts_are_only_recorded(capsys):
    periodic, recorded = PeriodicEvaluation.__new__(PeriodicEvaluation), []
    periodic.part, periodic.evaluator = "val", SimpleNamespace(images=lambda *_: [], files=lambda *_: [])
    periodic.recorder = SimpleNamespace(write_scalars=lambda step, values: recorded.extend(values))
    figures = {"eval/best/knn/top1": 0.5, "eval/purity/block_01": 0.25, "eval/share/block_03/7": 0.125}
    periodic.write(None, 4, figures, time.monotonic())
    assert "at step 4: eval/best/knn/top1 0.5000  eval/purity/block_01 0.2500  (0 s)" in capsys.readouterr().out
    assert recorded == list(figures)


@pytest.mark.slow
def test_the_best_checkpoint_has_the_lowest_validation_loss(evaluated):
    losses = {line["step"]: line["val/loss"] for line in lines(evaluated) if "val/loss" in line}
    score = json.loads((evaluated / "best" / "score.json").read_text())
    best = min(losses, key=losses.__getitem__)
    assert score == {"step": best, "metric": "loss", "max_examples": 32, "crop_ratio": 224 / 256,
                     "score": -losses[best]}
    assert [path.name for path in (evaluated / "best" / "checkpoints").iterdir()] == [str(best)]


def test_only_a_better_state_replaces_the_best_also_after_a_restart(tmp_path):
    best = BestCheckpoint(epath.Path(tmp_path), "top1")
    for step, top1 in ((1, 0.5), (2, 0.4), (3, 0.6), (4, 0.6)):
        best.update(step, {"x": jnp.full(3, step)}, {"val/top1": top1})
    again = BestCheckpoint(epath.Path(tmp_path), "top1")
    again.update(5, {"x": jnp.full(3, 5)}, {"val/top1": 0.55})
    np.testing.assert_array_equal(again.checkpoints.restore({"x": jnp.zeros(3, jnp.int32)})["x"], [3, 3, 3])


def test_what_is_no_number_is_never_the_best_and_another_metric_starts_anew(tmp_path):
    best = BestCheckpoint(epath.Path(tmp_path), "top1")
    best.update(1, {"x": jnp.zeros(3)}, {"val/top1": float("nan")})
    assert not best.file.exists()
    best.update(2, {"x": jnp.zeros(3)}, {"val/top1": 0.9})
    best.update(3, {"x": jnp.zeros(3)}, {"val/top1": float("nan")})
    assert json.loads(best.file.read_text())["step"] == 2
    raw = BestCheckpoint(epath.Path(tmp_path / "raw"), "raw/loss")
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        raw.update(step, {"x": jnp.zeros(3)}, {"val/raw/loss": loss})
    assert json.loads(raw.file.read_text())["step"] == 2
    other = BestCheckpoint(epath.Path(tmp_path), "loss")
    other.update(4, {"x": jnp.zeros(3)}, {"val/loss": 5.0})
    assert json.loads(other.file.read_text()) == {"step": 4, "metric": "loss", "score": -5.0}
    # A score of other images is none to compare with.
    fewer = BestCheckpoint(epath.Path(tmp_path), "loss", max_examples=7)
    assert fewer.score == float("-inf")


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"metric": "loss"}', b'{"\xff": 1}',
                                  b'{"metric": "loss", "score": "high"}'])
def test_a_damaged_score_is_told_by_name(tmp_path, text):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "score.json").write_bytes(text)
    with pytest.raises(UserError, match=r"best/score\.json is damaged"):
        BestCheckpoint(epath.Path(tmp_path), "loss")


def test_a_score_that_finds_no_room_ends_no_run(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paths, "replace_text", full)
    best = BestCheckpoint(epath.Path(tmp_path), "loss")
    best.update(3, {"a": np.zeros(2)}, {"val/loss": 0.5})
    assert "score.json: [Errno 28] No space left on device" in caplog.text
    assert best.score == -0.5


@pytest.mark.slow
def test_the_best_checkpoint_is_read_like_any_other(evaluated):
    step = json.loads((evaluated / "best" / "score.json").read_text())["step"]
    assert config_of(str(evaluated / "best")).method.name == "supervised"
    best, same = (flatten(load_params(str(folder), ema=True))
                  for folder in (evaluated / "best", evaluated / "best" / "checkpoints" / str(step)))
    assert best.keys() == same.keys()
    for name, leaf in best.items():
        np.testing.assert_array_equal(leaf, same[name], err_msg=name)


@pytest.mark.slow
def test_a_run_that_is_evaluated_no_more_often_than_it_is_long_is_evaluated_at_its_end_alone(tmp_path):
    fields = {"checkpoint.best_metric": "", "data.val_split": "", "train.duration": "2 steps",
              "eval.every": "1e9 steps"}
    assert loop.train(tiny_supervised(SPLITS | fields), str(tmp_path)) == 0
    assert [line["step"] for line in lines(tmp_path) if "eval/loss" in line] == [2]


@pytest.mark.parametrize(("fields", "line"), [
    ({"checkpoint.best_metric": "top2"}, "checkpoint.best_metric='top2'.* 'top"),
    ({"checkpoint.best_metric": "raw/top1"}, "checkpoint.best_metric='raw/top1'"),
    ({"eval.sets": ("imagenet_v2",)}, "imagenet_v2")])
def test_what_an_evaluation_cannot_give_is_said_before_the_first_step(tmp_path, fields, line):
    with pytest.raises(UserError, match=line):
        loop.train(tiny_supervised(SPLITS | fields), str(tmp_path))
    assert not (tmp_path / "config.json").exists()  # another config may begin there


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "method"), [
    ({"optim.ema": 0.9, "model.pool": "mean"}, "supervised"), ({}, "segment"), ({}, "mae"), ({}, "splitmask"),
    ({}, "dino")])
def test_the_figures_that_are_foretold_are_those_that_are_measured(tmp_path, fields, method):
    splits = {name: value for name, value in SPLITS.items() if name != "method.classes" or method == "supervised"}
    mosaic = {"data.source": "photo_mosaic", "data.train_split": "train[:50%]", "data.val_split": "train[50%:]"}
    splits |= mosaic if method == "segment" else {}
    config = tiny_config(splits | {"checkpoint.best_metric": "loss", "eval.max_examples": 32} | fields, method)
    run = training_run.prepare(config, tmp_path)
    with jax.set_mesh(run.program.mesh):
        evaluator = Evaluator(run.program.method, run.inputs, run.program.mesh)
        measured = evaluator.scalars(run.program.init(next(training_run.device_batches(run, 0))), "val")
        foretold = evaluator.metric_names(run.program.state)
    assert sorted(foretold) == sorted(name.removeprefix("val/") for name in measured)


def test_choosing_needs_a_validation_part():
    with pytest.raises(UserError, match=r"checkpoint\.best_metric='top1' .*data\.val_split"):
        tiny_supervised({"checkpoint.best_metric": "top1"})
