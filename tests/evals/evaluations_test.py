"""The table of evaluations: what each says of itself holds, and one more is one line."""

from types import SimpleNamespace
from typing import get_args

import jax
import numpy as np
import pytest

from mae_jax import methods, plugins
from mae_jax.data.sources.base import Example, Source
from mae_jax.errors import UserError
from mae_jax.evals import evaluator as evaluators
from mae_jax.evals.base import Evaluation, When
from mae_jax.evals.context import Context
from mae_jax.evals.evaluator import EVALUATIONS, Evaluator
from mae_jax.runtime import sharding
from mae_jax.state import TrainState
from tests.helpers.tiers import all_slow_but
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_method

CASES = {name: (name, {}) for name in methods.TABLE} | {
    "moce": ("moce", {"method.num_clusters": 3}),
    "moce of tokens": ("moce", {"method.gate": "token"}),
    "segment": ("segment", {"method.background": 0}),
    "supervised": ("supervised", {"eval.sets": ("imagenet_v2", "imagenet_r:1.0.0"), "optim.ema": 0.5}),
    "supervised, many classes": ("supervised", {"method.classes": 7}),
    "supervised, several labels": ("supervised", {"method.multi_label": True, "method.loss": "bce"}),
}


def evaluated(name: str, fields: dict) -> tuple[Evaluator, TrainState]:
    """Returns the evaluator of a tiny method on labeled random images, and a first state."""
    config = tiny_config(fields, name)
    method = tiny_method(config)

    def batches(*_):
        for seed in (1, 2):
            batch, rng = tiny_batch(config, seed, train=False), np.random.default_rng(seed)
            if "pixel_label" in method.eval_spec():
                batch["pixel_label"] = rng.integers(3, size=method.eval_spec()["pixel_label"].shape).astype(np.uint8)
            if "labels" in method.eval_spec():
                batch["labels"] = rng.integers(2, size=method.eval_spec()["labels"].shape).astype(np.uint8)
            if "cluster" in method.eval_spec():
                batch["cluster"] = rng.integers(3, size=config.batch_size).astype(np.int32)
            batch["valid"][5:] = seed == 1
            yield batch

    classes = tuple("abcdefg"[: config.method.classes if "classes" in config.method else 3])
    inputs = SimpleNamespace(classes=classes, evaluate=batches, validate=batches, support=batches, extra=batches,
                             parts={})
    params, extras = jax.jit(method.init)(jax.random.key(0), tiny_batch(config))
    ema = params if config.optim.ema else {}
    zero = np.zeros((), np.int32)
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    return Evaluator(method, inputs, mesh), TrainState(zero, params, (), extras, ema, zero)


@pytest.mark.parametrize("case", all_slow_but((), CASES))
def test_the_names_that_an_evaluation_tells_are_those_of_its_figures(case):
    evaluator, state = evaluated(*CASES[case])
    ctx = evaluator._context(evaluator.applying, state.params, state, "eval")
    given = {}
    for each in evaluator.applying:
        figures = each.scalars(ctx)
        assert sorted(figures) == sorted(each.metric_names(evaluator.method, evaluator.inputs)), each.name
        given |= figures if each.when == "periodic" else {}
    raw = {f"raw/{name}" for name in given} if state.ema else set()
    assert sorted(evaluator.metric_names(state)) == sorted({*given, *raw})
    assert evaluator.scalars(state).keys() == {f"eval/{name}" for name in {*given, *raw}}
    assert all(np.isfinite(value) for value in given.values())


def test_every_evaluation_has_a_name_of_its_own_and_a_case_above():
    assert len({each.name for each in EVALUATIONS}) == len(EVALUATIONS)
    assert {each.when for each in EVALUATIONS} == set(get_args(When))
    own_size = "segment", {"method.test": "slide"}  # of images, not of batches: tests/evals/own_size_test.py
    applying = set()
    for name, fields in [*CASES.values(), own_size]:
        config = tiny_config(fields, name)
        one = Source(1, lambda number: Example(b""), str)
        data = SimpleNamespace(classes=("a", "b"), parts={config.data.eval_split: one, config.data.val_split: one})
        applying |= {each for each in EVALUATIONS if each.applies(tiny_method(config), data)}
    assert applying == set(EVALUATIONS)


def test_a_task_says_what_a_method_has():
    has = {"classification": "logits", "segmentation": "pixel_logits", "detection": "detections"}
    for name in methods.TABLE:
        method = methods.get(name)
        assert [task for task, wanted in has.items() if hasattr(method, wanted)] == [method.task] * (method.task in has)
        assert hasattr(method, "reconstruct") == method.reconstructs, name


class Brightness(Evaluation):
    """An evaluation as somebody would add it: a figure, and an image of what it saw."""

    name = "brightness"

    def metric_names(self, method, data) -> list[str]:
        return ["brightness"]

    def scalars(self, ctx: Context) -> dict[str, float]:
        sums = [float(batch["patches"].mean() / 255) for batch in ctx.batches()]
        ctx.notes[self.name] = sums
        return {"brightness": float(np.mean(sums))}

    def images(self, ctx):
        yield "brightness", np.full((4, 4, 3), 255 * ctx.notes[self.name][0], np.uint8)


@pytest.mark.slow
def test_one_more_evaluation_is_one_line_of_the_table(monkeypatch):
    monkeypatch.setattr(evaluators, "EVALUATIONS", (*EVALUATIONS, Brightness()))
    evaluator, state = evaluated("mae", {})
    assert "brightness" in evaluator.metric_names(state)
    figures = evaluator.scalars(state)
    assert 0.4 < figures["eval/brightness"] < 0.6
    images = dict(evaluator.images(state))
    assert list(images) == ["reconstruct", "ratios", "attention", "brightness"]
    assert images["brightness"].shape == (4, 4, 3)


class Rows(Evaluation):
    """Counts valid images."""

    def __init__(self, name: str, when: str):
        self.name, self.when = name, when

    def counts(self, method, outputs, batch) -> dict[str, jax.Array]:
        return {self.name: batch["valid"].astype(int).sum()}

    def scalars(self, ctx: Context) -> dict[str, float]:
        return {f"{self.name}/{name}": float(count) for name, count in ctx.held_out.counts.items()}


@pytest.mark.slow
def test_a_pass_counts_for_the_evaluations_that_it_is_for(monkeypatch):
    each = (Rows("often", "periodic"), Rows("late", "last"), Rows("once", "final"), Rows("asked", "on_demand"),
            Rows("asked_too", "on_demand"))
    monkeypatch.setattr(evaluators, "EVALUATIONS", each)
    evaluator, state = evaluated("segment", {})
    assert evaluator.scalars(state) == {"eval/often/often": 13}
    assert evaluator.last_evaluations(state) == {"eval/late/late": 13}
    assert evaluator.final_evaluations(state) == {"eval/once/once": 13}
    assert evaluator.on_demand("asked", state) == {"eval/asked/asked": 13}


def test_further_sets_are_read_for_logits_alone(monkeypatch):
    evaluator, state = evaluated("supervised", {"eval.sets": ("imagenet_v2",)})
    monkeypatch.setattr(evaluator.method, "loss", None)
    assert 0 <= evaluator.final_evaluations(state)["eval/imagenet_v2/top1"] <= 1
    evaluator.inputs.extra = lambda name: iter([tiny_batch(evaluator.method.config) | {"label": np.full(8, -1)}])
    assert np.isnan(evaluator.final_evaluations(state)["eval/imagenet_v2/top1"])


class Lossy(Brightness):
    """Takes the name of a figure or a count that another evaluation gives."""

    name = "lossy"

    def __init__(self, figure: str, count: str = ""):
        self.figure, self.count = figure, count

    def metric_names(self, method, data) -> list[str]:
        return [self.figure]

    def scalars(self, ctx: Context) -> dict[str, float]:
        return {"brightness": 0.0}

    def counts(self, method, outputs, batch):
        return {self.count: outputs.sum()} if self.count else {}


@pytest.mark.parametrize(("case", "other", "theirs"), [
    ("mae", Lossy("loss"), "'held_out_loss' and 'lossy' both return the figure 'loss'"),
    ("supervised", Lossy("top1"), "'classification' and 'lossy' both return the figure 'top1'"),
    ("segment", Lossy("own", "pixels"), "'segmentation' and 'lossy' both return the count 'pixels'"),
])
def test_two_evaluations_that_give_the_same_name_are_refused_before_the_first_step(monkeypatch, case, other, theirs):
    monkeypatch.setitem(plugins._registered["evaluations"], "lossy", (other, __name__))
    with pytest.raises(UserError, match=theirs):
        evaluated(*CASES[case])


@pytest.mark.slow
def test_two_evaluations_that_give_the_same_figure_without_saying_so_are_refused_when_they_do(monkeypatch):
    for each in (Brightness(), Lossy("own")):
        monkeypatch.setitem(plugins._registered["evaluations"], each.name, (each, __name__))
    evaluator, state = evaluated("mae", {})
    with pytest.raises(UserError, match="'brightness' and 'lossy' both return the figure 'brightness'"):
        evaluator.scalars(state)


def test_an_evaluation_of_a_plug_in_has_the_name_by_which_it_is_given(monkeypatch):
    monkeypatch.setitem(plugins._registered["evaluations"], "bright", (Brightness, __name__))
    with pytest.raises(UserError, match="the evaluation 'bright' of a plug-in has the attribute name='brightness'"):
        evaluators.evaluations()


def test_an_evaluation_of_a_plug_in_that_would_never_run_is_refused(monkeypatch):
    monkeypatch.setitem(plugins._registered["evaluations"], "early", (Rows("early", "first"), __name__))
    with pytest.raises(UserError, match=r"'early' has when='first'.*known: final, last, on_demand, periodic"):
        evaluators.evaluations()


def test_the_evaluated_part_is_read_once_for_figures_and_the_training_split_once():
    evaluator, state = evaluated("mae", {})
    read, batches = [], evaluator.inputs.evaluate

    def reading(part):
        return lambda: read.append(part) or batches()

    evaluator.parts["eval"], evaluator.inputs.support = reading("evaluate"), reading("support")
    evaluator.scalars(state)
    assert read == ["evaluate", "support"]


def test_an_evaluation_on_demand_is_asked_for_by_name():
    evaluator, state = evaluated("supervised", {})
    found = evaluator.on_demand("frozen_probes", state, "val")
    assert found.keys() == {"val/linear/top1", "val/knn/top1", "val/sgd/top1"}
    assert evaluator.last_evaluations(state) == {}  # raw pixels are for features that are probed
    with pytest.raises(UserError, match=r"'frozen_probe'.*did you mean 'frozen_probes'"):
        evaluator.on_demand("frozen_probe", state)
