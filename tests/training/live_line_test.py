"""A whole run on a terminal: its phases, and what stays on the screen."""

import re
import sys

import pytest

from tests.helpers.terminal import on_terminal, screen

TRAIN = [sys.executable, "-m", "mae_jax", "train", "--config=quickstart:runlocal", "--config.log.every=2 steps",
         "--config.eval.every=1000 steps", "--config.eval.max_examples=32"]
PHASES = ("starting", "opening the data", "initializing the model", "training", "evaluating linear probe",
          "drawing attention maps")  # and compiling, where that takes longer than what is done meanwhile
LIVE = (*PHASES, "compiling", "writing", "finding")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_shows_its_phases_and_leaves_its_lines_alone(tmp_path):
    written, code = on_terminal([*TRAIN, f"--workdir={tmp_path / 'run'}", "--config.train.duration=30 steps"], 100,
                                seconds=600)
    assert code == 0
    places = [written.find(f"\r{phase} ") for phase in PHASES]
    assert all(place >= 0 for place in places), dict(zip(PHASES, places, strict=True))
    assert places == sorted(places)
    shown = screen(written)
    assert not [line for line in shown if line.startswith(LIVE)]
    assert sum(line.startswith("step ") for line in shown) == 15
    assert shown[-1] == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_interrupt_saves_and_leaves_a_clean_terminal(tmp_path):
    written, code = on_terminal([*TRAIN, f"--workdir={tmp_path / 'run'}", "--config.train.duration=900000 steps"], 100,
                                interrupt_at="loss 1.", seconds=600)
    assert code == 75
    assert re.search(r"\rtraining [\d,]+ of 900,000 steps +0%\|.*loss \d\.\d{4}  [\d]+ images/s  .*left", written)
    shown = screen(written)
    assert "stopping: saving after this step; press Ctrl-C again to quit at once" in shown
    assert re.fullmatch(r"stopped at step \d+ of 900000, state saved; the same command goes on", shown[-2])
    assert not [line for line in shown if line.startswith(LIVE)]
