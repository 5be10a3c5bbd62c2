"""The parts that are measured, and what they share."""

import pytest

from mae_jax.commands.bench import timed_step
from tests.helpers.tiny import tiny_config

PARTS = ("step", "input", "both")


@pytest.mark.slow
def test_all_parts_are_measured_with_one_compiled_step_of_the_datas_own_classes(monkeypatch):
    steps = []
    build = timed_step.TimedStep.__init__
    monkeypatch.setattr(timed_step.TimedStep, "__init__", lambda self, *args: steps.append(self) or build(self, *args))
    figures = dict(timed_step.measure(tiny_config({"method.classes": 0}, "supervised"), list(PARTS), 0))
    assert tuple(figures) == PARTS
    assert all(part["images_per_sec"] > 0 for part in figures.values())
    assert len(steps) == 1
    assert steps[0].state.params["head"]["bias"].shape == (17,)  # of photo_crops


@pytest.mark.slow
def test_the_step_alone_opens_no_data(monkeypatch):
    monkeypatch.setattr("mae_jax.methods.with_data", lambda config: pytest.fail("data is opened"))
    [(part, figures)] = timed_step.measure(tiny_config(), ["step"], 0)
    assert (part, figures["steps"]) == ("step", 3)
    assert figures["tflops_per_device"] > 0
