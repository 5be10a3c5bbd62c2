"""Runs that end early, and the figures that they and their best checkpoint are chosen by."""

import json
import re

import jax.numpy as jnp
import pytest
from etils import epath

from mae_jax import config as configs
from mae_jax.errors import UserError
from mae_jax.evals.evaluator import Evaluator
from mae_jax.training import ending, evaluation, loop
from mae_jax.training.ending import EarlyEnd
from mae_jax.training.evaluation import BestCheckpoint, known_mode
from tests.helpers.tiny import tiny_config

FIELDS = {"data.source": "photo_crops", "data.train_split": "train[:64]", "data.val_split": "train[3336:]",
          "data.eval_split": "test[:16]", "eval.max_examples": 16, "train.duration": "12 steps",
          "eval.every": "2 steps", "checkpoint.every": "2 steps", "checkpoint.best_metric": "val/loss",
          "train.patience": "4 steps", "eval.pictures": 2}
LOSSES = {0: 5.0, 2: 4.0, 4: 4.5, 6: 4.25, 8: 3.0}  # step 8 would be better: it is not reached


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def measured(monkeypatch):
    """Evaluations of the validation part that cost nothing; returns the steps at which they were asked for."""
    asked = []

    def scalars(self, state, part="eval"):
        asked.append((part, int(state.step)))
        return {f"{part}/loss": LOSSES[int(state.step)] if part == "val" else 1.0}

    monkeypatch.setattr(Evaluator, "scalars", scalars)
    monkeypatch.setattr(Evaluator, "images", lambda *_: [])
    monkeypatch.setattr(Evaluator, "last_evaluations", lambda *_: {})
    monkeypatch.setattr(Evaluator, "final_evaluations", lambda *_: {})
    return asked


@pytest.mark.slow
def test_a_run_ends_after_its_patience_reports_and_says_so_again(tmp_path, measured, capsys):
    folder = tmp_path / "run"
    assert loop.train(tiny_config(FIELDS), str(folder)) == 0
    why = "val/loss was best at step 2"
    assert f"finished 6 steps of 12, early: {why}, train.patience='4 steps'" in capsys.readouterr().out
    assert (folder / "DONE").read_text() == f"6\n{why}\n"
    last = next(line for line in lines(folder) if line.get("val/loss") == LOSSES[6])
    assert (last["step"], last["val/best_step"], last["eval/loss"], last["eval/best/loss"]) == (6, 2, 1.0, 1.0)
    assert json.loads((folder / "best" / "score.json").read_text())["step"] == 2
    asked = list(measured)
    assert loop.train(tiny_config(FIELDS), str(folder)) == 0
    assert f"finished: step 6 of 12, early: {why}, train.patience='4 steps'; a longer" in capsys.readouterr().out
    assert measured == asked
    # More patience goes on from there.
    longer = FIELDS | {"train.patience": "6 steps", "train.duration": "8 steps"}
    assert loop.train(tiny_config(longer), str(folder)) == 0
    assert (folder / "DONE").read_text() == "8\n"


@pytest.mark.slow
@pytest.mark.parametrize("dies_at", ["the score", "the record", "DONE"])
def test_a_run_that_dies_anywhere_ends_at_the_same_step(tmp_path, measured, monkeypatch, dies_at):
    class Killed(BaseException):
        pass

    where = {"the score": (evaluation.BestCheckpoint, "update"), "the record": (evaluation.PeriodicEvaluation, "write"),
             "DONE": (ending, "mark")}[dies_at]
    original = getattr(*where)
    folder, reached = tmp_path / "run", {"step": 0}

    def once(*args, **kwargs):
        step = args[1] if dies_at != "the record" else args[2]
        if step == 6 and not reached["step"]:
            reached["step"] = step
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(*where, once)
    with pytest.raises(Killed):
        loop.train(tiny_config(FIELDS), str(folder))
    assert not (folder / "DONE").exists()
    assert loop.train(tiny_config(FIELDS), str(folder)) == 0
    assert (folder / "DONE").read_text() == "6\nval/loss was best at step 2\n"
    assert [line["step"] for line in lines(folder) if "val/loss" in line] == [0, 2, 4, 6]
    assert [line["step"] for line in lines(folder) if "eval/best/loss" in line] == [6]


def test_done_names_the_step_and_the_reason(tmp_path):
    folder = epath.Path(tmp_path)
    assert (ending.finished(folder), ending.early_end(folder)) == (0, None)
    ending.mark(folder, 20, None)
    assert (folder / "DONE").read_text() == "20\n"
    assert (ending.finished(folder), ending.early_end(folder)) == (20, None)
    ending.mark(folder, 20, EarlyEnd("val/knn/top1", 8))
    assert (ending.finished(folder), ending.early_end(folder)) == (20, ("val/knn/top1", 8))
    (folder / "DONE").write_text("20\nsomething else\n")
    assert (ending.finished(folder), ending.early_end(folder)) == (20, None)


@pytest.mark.parametrize(("metric", "mode"), [
    ("loss", "min"), ("raw/loss", "min"), ("mean_colour_loss", "min"), ("top1", "max"), ("knn/top1", "max"),
    ("rankme", "max"), ("miou", "max"), ("pixel_accuracy", "max"), ("map_all", "max"), ("mean_per_class", "max")])
def test_which_value_is_the_best_is_known_of_figures_built_in(metric, mode):
    assert known_mode(metric) == mode


def test_of_another_figure_it_must_be_given(tmp_path):
    with pytest.raises(UserError, match=r"best_metric='purity'.*checkpoint\.best_mode=max or min"):
        BestCheckpoint(epath.Path(tmp_path), "purity")
    lowest = BestCheckpoint(epath.Path(tmp_path), "purity", "min")
    for step, value in ((1, 0.5), (2, 0.25), (3, 0.75)):
        lowest.update(step, {"x": jnp.zeros(3)}, {"val/purity": value})
    assert lowest.step == 2
    again = BestCheckpoint(epath.Path(tmp_path), "val/purity", "min")
    assert (again.score, again.step) == (-0.25, 2)
    highest = BestCheckpoint(epath.Path(tmp_path), "purity", "max")
    assert highest.score == float("-inf")


@pytest.mark.parametrize(("metric", "line"), [
    ("eval/loss", "did you mean 'val/loss'"), ("neighbour", "not evaluated")])
def test_a_figure_that_cannot_be_chosen_by_is_refused(tmp_path, metric, line):
    with pytest.raises(UserError, match=line):
        loop.train(tiny_config(FIELDS | {"checkpoint.best_metric": metric}), str(tmp_path / "run"))


def test_patience_needs_a_figure_and_is_a_duration():
    for fields, line in (({"checkpoint.best_metric": ""}, "train.patience='4 steps' needs checkpoint.best_metric"),
                         ({"train.patience": "4"}, "cannot read the duration '4'")):
        with pytest.raises(UserError, match=re.escape(line)):
            tiny_config(FIELDS | fields)
    assert configs.default().train.patience == ""
