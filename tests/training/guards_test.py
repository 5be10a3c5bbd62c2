"""What guards a run besides the finite check: spikes that are skipped, and hangs that are ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from mae_jax.errors import UserError
from mae_jax.methods.mae import MAE
from mae_jax.param_tree import flatten
from mae_jax.runtime import watchdog
from mae_jax.runtime.watchdog import Watchdog
from mae_jax.training import spike_detector, workdir
from tests.faults import hang
from tests.faults.processes import ends, output, start, wait_for
from tests.helpers.tiny import TINY_DATA, tiny_batch, tiny_config, tiny_state, tiny_step


class Spiking(MAE):
    """A MAE whose loss is a thousand times larger where a batch says so."""

    def loss(self, params, extras, batch, key, step, train):
        loss, (metrics, extras) = super().loss(params, extras, batch, key, step, train)
        factor = 1 + 999 * batch["replaced"].max()
        total, weight = metrics["loss"]
        return loss * factor, (metrics | {"loss": (total * factor, weight)}, extras)


@pytest.mark.slow
def test_a_spike_changes_nothing_but_step_and_history_and_is_counted():
    config = tiny_config({"guard.spike": 6.0, "optim.ema": 0.9, "optim.lr": 1e-4, "train.duration": "100 steps"})
    step = tiny_step(config, Spiking(config, TINY_DATA))
    state = tiny_state(config)._replace(history=spike_detector.no_history(("loss", "grad_norm")))
    batch = tiny_batch(config)
    for _ in range(64):
        state, metrics = step(state, batch)
    assert metrics["spikes"][0] == 0
    kept = jax.device_get((state.params, state.opt, state.extras, state.ema))
    state, metrics = step(state, batch | {"replaced": np.ones(config.batch_size, np.int32)})
    assert (metrics["spikes"][0], metrics["bad_steps"][0], int(state.step)) == (1, 0, 65)
    after = flatten(jax.device_get((state.params, state.opt, state.extras, state.ema)))
    for name, value in flatten(kept).items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    state, metrics = step(state, batch)
    assert metrics["spikes"][0] == 0
    assert any((flatten(jax.device_get(state.params))[name] != value).any() for name, value in flatten(kept[0]).items())


def test_spikes_cannot_come_or_go_at_a_resume_other_guards_can():
    with pytest.raises(UserError, match=r"guard\.spike: 0\.0 -> 6\.0"):
        workdir.compare(tiny_config(), tiny_config({"guard.spike": 6.0}))
    assert workdir.compare(tiny_config(), tiny_config({"guard.stall_seconds": 5.0})) == [
        "guard.stall_seconds: 1800.0 -> 5.0"]


@pytest.mark.slow
@pytest.mark.parametrize("what", hang.PLACES)
def test_a_run_that_hangs_ends_with_3_and_leaves_the_stacks_of_all_threads(tmp_path, what):
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.run([sys.executable, "-m", "tests.faults.hang", what, str(tmp_path / "run")], timeout=120,
                             env=environment, capture_output=True, text=True)
    assert process.returncode == 3, process.stdout + process.stderr
    assert f"took more than guard.stall_seconds={hang.SECONDS:g}" in process.stderr
    assert hang.PLACES[what] in process.stderr
    stacks = (tmp_path / "run" / "stacks_0.txt").read_text()
    assert "hang.py" in stacks
    assert "in sleeps" in stacks
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_time_in_which_the_whole_process_is_frozen_does_not_count(tmp_path):
    folder = tmp_path / "run"
    [process] = start(folder, tmp_path / "compiled", 1, 1, {"guard.stall_seconds": 8.0, "pause": 0.1})
    assert wait_for(folder / "metrics.jsonl", [process])  # it is in the middle of its steps
    process.send_signal(signal.SIGSTOP)
    time.sleep(11)  # a save may take seconds where others work
    process.send_signal(signal.SIGCONT)
    assert ends([process]) == [0], output(folder, 0)
    assert not (folder / "stacks_0.txt").exists()


@pytest.mark.slow
def test_a_full_disk_does_not_keep_the_watchdog_from_ending_the_run(tmp_path):
    program = ("import resource, signal, sys, time\nfrom etils import epath\n"
               "from mae_jax.runtime.watchdog import Watchdog\n"
               "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
               "with Watchdog(0.2, epath.Path(sys.argv[1])) as dog:\n    dog.watch('a save')\n    time.sleep(20)\n")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert "a save took more than guard.stall_seconds=0.2" in done.stderr
    assert "Thread MainThread" in done.stderr


class Ticks:
    """A clock that nobody waits for: each wait of the watchdog passes at once, and then the next thing is done."""

    def __init__(self, things: list[Callable[[], None] | float]):
        self.now, self.things = 0.0, iter(things)

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        thing = next(self.things, None)
        if callable(thing):
            thing()
        elif thing:
            self.now += thing  # the process was frozen
        return thing is None


@pytest.fixture
def left(tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """Returns a function that lets a watchdog of 2 s see things, one after each of its ticks, and says what it left."""
    def watch(things: Callable[[Watchdog], list]) -> list[str]:
        found, dog = [], Watchdog(2.0, tmp_path)
        clock = Ticks(things(dog))
        monkeypatch.setattr(Watchdog, "_leave", lambda self, doing: found.append(doing))
        monkeypatch.setattr(watchdog, "_running", dog)
        monkeypatch.setattr(watchdog, "time", clock)
        monkeypatch.setattr(dog, "_end", clock)
        dog._watch()
        return found

    return watch


NOTHING = 0.0


def test_what_gets_on_or_is_not_watched_is_left_alone(left, tmp_path):
    assert watchdog.TICK == 0.5
    assert left(lambda dog: [lambda: dog.watch("a step"), *[NOTHING] * 4]) == []
    assert left(lambda dog: [lambda: dog.watch("a step"), *[NOTHING] * 5]) == ["a step"]
    assert left(lambda dog: [lambda: dog.watch("an evaluation"), *[NOTHING, NOTHING, watchdog.heartbeat] * 9]) == []
    assert left(lambda dog: [lambda: dog.watch("a step"), NOTHING, lambda: dog.watch(""), *[NOTHING] * 9]) == []
    with Watchdog(0, tmp_path) as dog:
        dog.watch("anything")
        assert not dog._thread.is_alive()


def test_of_the_time_in_which_the_process_was_frozen_two_ticks_count(left):
    assert left(lambda dog: [lambda: dog.watch("a step"), 600.0, NOTHING, NOTHING]) == []
    assert left(lambda dog: [lambda: dog.watch("a step"), 600.0, NOTHING, NOTHING, NOTHING]) == ["a step"]


@pytest.mark.slow
def test_the_history_of_spikes_is_part_of_the_checkpoint(tmp_path):
    from mae_jax.training import loop
    from mae_jax.training import run as training_run

    config = tiny_config({"guard.spike": 6.0, "eval.every": ""})
    assert loop.train(config, str(tmp_path)) == 0
    losses = [json.loads(line)["train/loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    run = training_run.prepare(config, tmp_path)
    state = loop.Checkpoints(tmp_path, 2).restore(run.program.state)
    np.testing.assert_allclose(state.history["loss"][:6], losses, rtol=1e-6)
    assert np.isnan(state.history["loss"][6:]).all()
