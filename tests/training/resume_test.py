"""Stopped or killed at any moment, a run goes on bit for bit: real processes, real signals."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mae_jax.param_tree import flatten
from mae_jax.storage.checkpoint import Checkpoints
from tests.faults import worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = 5


def start(folder: Path, cache: Path) -> subprocess.Popen:
    """Starts the worker on `folder`; compiled programs are kept in `cache`, so that a restart takes seconds."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": os.getcwd(),
                                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen([sys.executable, worker.__file__, str(folder) + ".ids", str(folder)], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(folder: Path, cache: Path) -> None:
    process = start(folder, cache)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> bool:
    """Waits for condition(); False when the process ended first."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < deadline, "the worker does not get on"
        time.sleep(0.002)
    return False


def final_state(folder: Path) -> dict[str, np.ndarray]:
    import jax

    from mae_jax.config import validate
    from mae_jax.training import run as training_run

    config = worker.small_config()
    validate(config)
    run = training_run.prepare(config, folder)
    state = Checkpoints(folder, 2).restore(run.program.state)
    assert int(state.step) == worker.STEPS
    return {name: np.asarray(jax.device_get(leaf)) for name, leaf in flatten(state).items()}


def drawn_ids(folder: Path) -> dict[int, str]:
    """Returns step → ids, and fails when a restart drew other examples for a step than the process before it."""
    drawn: dict[int, str] = {}
    for line in Path(f"{folder}.ids").read_text().splitlines():
        step, ids = line.split(" ", 1)
        assert drawn.setdefault(int(step), ids) == ids, f"step {step} was drawn twice, differently"
    return drawn


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def golden(tmp_path_factory, cache) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """The state and the examples of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("golden") / "run"
    finish(folder, cache)
    return final_state(folder), drawn_ids(folder)


def assert_like(golden: tuple[dict[str, np.ndarray], dict[int, str]], folder: Path) -> None:
    state, ids = golden
    for name, value in final_state(folder).items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
    ours = drawn_ids(folder)
    for step in range(worker.STEPS):
        assert ours[step] == ids[step], f"step {step} saw other examples"
    logged = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(4, worker.STEPS + 1, 4))


def test_kill_9_at_random_moments_and_during_saves_changes_nothing(golden, cache, tmp_path):
    folder, draws, killed = tmp_path / "run", random.Random(0), 0
    for attempt in range(KILLS):
        process = start(folder, cache)
        if attempt % 2:  # in the middle of a save
            saving = wait_until(lambda: list(folder.glob("checkpoints/*tmp*")), process)
            time.sleep(draws.uniform(0, 0.05) if saving else 0)
        else:
            wait_until(lambda: (folder / "metrics.jsonl").exists(), process)
            time.sleep(draws.uniform(0, 1.0))
        killed += process.poll() is None
        process.kill()
        process.communicate()
    finish(folder, cache)
    assert killed >= 2, "the worker was too fast to be killed"
    assert_like(golden, folder)


def test_a_signal_saves_at_the_current_step_exits_75_and_changes_nothing(golden, cache, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, cache)
    assert wait_until(lambda: (folder / "checkpoints" / "4").exists(), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    stopped = re.search(rf"stopped at step (\d+) of {worker.STEPS}, state saved; the same command goes on", output)
    assert stopped, output
    assert (folder / "checkpoints" / stopped[1]).is_dir()
    finish(folder, cache)
    assert_like(golden, folder)
