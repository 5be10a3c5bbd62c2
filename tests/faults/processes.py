"""Kills, freezes and stops processes of a run at random moments, and compares what comes out with an untouched run.

  python -m tests.faults.processes --rounds=20 --seed=0 --to=tests/faults/results/processes_campaign.jsonl

Each round starts a run of two processes with one device each, does one thing to one of them at a random moment after
they have met, waits for all to end, starts the same commands again, and compares the last state bit for bit, and the
examples of each step, with those of a run that nothing disturbed. One JSON line per round; a restart goes on where it
ended. At the end it prints the table.
"""

import argparse
import collections
import functools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from mae_jax.param_tree import flatten
from mae_jax.state import TrainState
from mae_jax.storage.checkpoint import Checkpoints
from mae_jax.training import run as training_run
from mae_jax.training import workdir
from mae_jax.training.run import Run
from tests.faults import peer
from tests.helpers.devices import simulated

FAULTS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "sigterm": signal.SIGTERM}
HEARTBEAT = 5.0  # seconds
BOUND = HEARTBEAT + 10  # seconds in which all others must have ended after a fault


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(devices: int, cache: Path) -> dict[str, str]:
    return simulated(devices) | {
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.getcwd()}


def start(folder: Path, cache: Path, processes: int = 2, devices: int = 8, fields: dict | None = None,
          heartbeat: float = HEARTBEAT, more: dict[str, str] | None = None) -> list[subprocess.Popen]:
    """Starts a run of `processes` with `devices` in all, and with `more` in their environment."""
    peer.small_config(folder.parent, {"method": (fields or {}).get("method", "mae")})  # writes the batches
    coordinator = f"127.0.0.1:{free_port()}" if processes > 1 else "off"
    numbers = [(processes, number) for number in range(processes)] if processes > 1 else [(-1, -1)]
    run = []
    for count, number in numbers:
        with Path(f"{folder}.out.{max(number, 0)}").open("w") as out:  # not a pipe, which would block when full
            run.append(subprocess.Popen(
                [sys.executable, "-m", "tests.faults.peer", str(folder), coordinator, str(count), str(number),
                 str(heartbeat), json.dumps(fields or {})], env=environment(devices // processes, cache) | (more or {}),
                stdout=out, stderr=subprocess.STDOUT))
    return run


def output(folder: Path, number: int) -> str:
    """Returns what a process of the last start has printed so far."""
    return Path(f"{folder}.out.{number}").read_text()


def wait_for(path: Path, run: list[subprocess.Popen], seconds: float = 120) -> bool:
    """Waits for a file; False when a process ended first."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if any(process.poll() is not None for process in run):
            return False
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.02)
    return True


def ends(run: list[subprocess.Popen], seconds: float = 240) -> list[int]:
    """Waits for all processes and returns their exit codes; none survives a time-out."""
    try:
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in run]
    finally:
        for process in run:
            process.kill()
            process.wait()


def finish(folder: Path, *args, **kwargs) -> list[str]:
    """Runs to the end; returns the outputs."""
    codes = ends(start(folder, *args, **kwargs))
    outputs = [output(folder, number) for number in range(len(codes))]
    assert codes == [0] * len(codes), "\n".join([str(codes), *outputs])
    return outputs


def restored(folder: Path) -> tuple[Run, TrainState]:
    """Returns a run and its newest checkpoint, read by this one process on its one device."""
    config = workdir.read_config(folder)
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    run = training_run.prepare(config, folder)
    return run, Checkpoints(folder, 2).restore(run.program.state)


def state_of(folder: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of the newest checkpoint by their paths."""
    return {name: np.asarray(jax.device_get(leaf)) for name, leaf in flatten(restored(folder)[1]).items()}


def drawn(folder: Path, kind: str = "ids", steps: int = peer.STEPS) -> dict[int, dict[int, int]]:
    """Returns step → row → example of all processes; fails where one was drawn twice, differently."""
    found: dict[int, dict[int, int]] = {}
    for file in folder.parent.glob(f"{folder.name}.{kind}.*"):
        for line in file.read_text().splitlines():
            if not line.endswith(f" {peer.END}"):
                continue
            step, *pairs = line.split()[:-1]
            rows = found.setdefault(int(step), {})
            for row, number in (map(int, pair.split(":")) for pair in pairs):
                assert rows.setdefault(row, number) == number, f"{folder}: step {step}, row {row} was drawn differently"
    return {step: found[step] for step in range(steps)}


@functools.cache
def outcome(folder: Path) -> tuple[dict[str, bytes], dict[int, dict[int, int]]]:
    """Returns all bits of the last state of a run that has ended, and what each row of each step was."""
    return {name: value.tobytes() for name, value in state_of(folder).items()}, drawn(folder)


def same(folder: Path, golden: Path) -> bool:
    """Says whether two runs ended with the same bits and saw the same examples."""
    return outcome(folder) == outcome(golden)


def joined(folder: Path, run: list[subprocess.Popen]) -> list[subprocess.Popen]:
    """Waits until the processes have found each other."""
    for number in range(len(run)):
        wait_for(Path(f"{folder}.joined.{number}"), run)
    return run


def strike(run: list[subprocess.Popen], victim: int, fault: str, after: float) -> dict:
    """Does it after so many seconds, and returns how the processes ended and how long that took."""
    time.sleep(after)
    struck = [process.poll() for process in run] == [None] * len(run)
    began = time.monotonic()
    if struck:
        run[victim].send_signal(FAULTS[fault])
    others = [process for number, process in enumerate(run) if fault == "sigterm" or number != victim]
    try:
        codes = ends(others, BOUND)
        seconds = time.monotonic() - began
    finally:
        run[victim].kill()  # it may be frozen
        run[victim].wait()
    return {"struck": struck, "codes": codes, "seconds": round(seconds, 2)}


def one_round(folder: Path, cache: Path, golden: Path, seed: int, number: int, length: float) -> dict:
    """Does round `number` and returns its line; a run that ends before its moment comes is tried again."""
    draws, fault = random.Random(f"{seed} {number}"), list(FAULTS)[number % len(FAULTS)]
    for attempt in range(20):
        victim, after, run = draws.randrange(2), draws.uniform(0, length), folder / f"run_{number}_{attempt}"
        found = strike(joined(run, start(run, cache, devices=2)), victim, fault, after)
        if not found["struck"]:
            continue
        saved = [int(path.name) for path in run.glob("checkpoints/*") if path.name.isdigit()]
        finish(run, cache, devices=2)
        return {"round": number, "fault": fault, "victim": victim, "after": round(after, 2), **found,
                "saved": max(saved, default=0), "same": same(run, golden)}
    raise AssertionError("the runs are too fast to be struck")


def report(lines: list[dict]) -> str:
    """Returns the table of a campaign in Markdown."""
    rows = ["| fault | rounds | exit codes of the others (sigterm: of both) | seconds to their end, median (most) | "
            "same bits and examples after the restart |", "|---|---|---|---|---|"]
    for fault in FAULTS:
        ours = [line for line in lines if line["fault"] == fault]
        codes = collections.Counter(", ".join(map(str, line["codes"])) for line in ours)
        seconds = [line["seconds"] for line in ours] or [0.0]
        rows.append(f"| {fault} | {len(ours)} | {'; '.join(f'{text} ({count})' for text, count in codes.items())} | "
                    f"{statistics.median(seconds):.1f} ({max(seconds):.1f}) | {sum(line['same'] for line in ours)} |")
    return "\n".join(rows) + "\n"


def campaign(rounds: int, seed: int, to: Path) -> None:
    done = len(to.read_text().splitlines()) if to.exists() else 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cache, golden = folder / "compiled", folder / "golden"
        finish(golden, cache, devices=2)
        warm = joined(folder / "warm", start(folder / "warm", cache, devices=2))
        began = time.monotonic()
        ends(warm)
        length = time.monotonic() - began
        for number in range(done, rounds * len(FAULTS)):
            line = one_round(folder, cache, golden, seed, number, length)
            with to.open("a") as out:
                out.write(json.dumps(line) + "\n")
            print(line, flush=True)
    print(report([json.loads(line) for line in to.read_text().splitlines()]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of each fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=Path("tests/faults/results/processes_campaign.jsonl"))
    arguments = parser.parse_args()
    campaign(arguments.rounds, arguments.seed, arguments.to)
