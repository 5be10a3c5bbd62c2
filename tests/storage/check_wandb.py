"""The sink of Weights & Biases against the package itself, offline: python -m tests.storage.check_wandb FOLDER.

A run, its restart, and one whose service is killed under it; needs the extra `wandb`, and no network.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from etils import epath

from mae_jax.storage.metric_writer import MetricWriter
from tests.helpers.tiny import tiny_config


def written(folder: Path, step: int, kill: bool = False) -> str:
    """Writes a step's figures as a run does; returns the id of the run."""
    writer = MetricWriter(epath.Path(folder), step, ("wandb",))
    assert "wandb" in writer.sinks, "the sink is off"
    writer.write_config(tiny_config())
    run = writer.sinks["wandb"].run
    if kill:
        for pid in services():
            os.kill(pid, signal.SIGKILL)
    for number in range(step + 1, step + 4):
        writer.write_scalars(number, {"train/loss": 1 / number, "eval/loss": float("nan")})
        writer.write_image(number, "inputs", np.full((8, 8, 3), number, np.uint8))
    writer.flush()
    writer.close()
    assert ("wandb" in writer.sinks) != kill, writer.sinks
    return run.id


def services() -> list[int]:
    """Returns the processes that this one has started."""
    listed = subprocess.run(["ps", "-o", "pid=,ppid=,comm=", "-A"], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, parent, name in (line.split(None, 2) for line in listed.splitlines())
            if int(parent) == os.getpid() and "wandb" in name]


def main(folder: Path) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ["WANDB_MODE"] = "offline"
    ids = {written(folder, step) for step in (0, 3)}
    assert len(ids) == 1, ids
    stored = list((folder / "wandb").glob("offline-run-*"))
    assert len(stored) == 2, stored
    assert json.loads((folder / "wandb.json").read_text()) == {"id": ids.pop()}
    images = list(folder.glob("wandb/offline-run-*/files/media/images/figures/*.png"))
    assert len(images) == 6, images
    assert read_back(stored) == {1: 1.0, 2: 0.5, 3: 1 / 3, 4: 0.25, 5: 0.2, 6: 1 / 6}
    written(folder, 6, kill=True)
    assert (folder / "metrics.jsonl").read_text().count("\n") == 9
    print("ok")


def read_back(runs: list[Path]) -> dict[int, float]:
    """Returns step → loss of what was stored to be sent later; checks that the config is there too."""
    from wandb.proto import wandb_internal_pb2

    losses, fields = {}, {}
    for run in runs:
        for data in records(next(run.glob("*.wandb")).read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if "train/loss" in row:
                losses[row["step"]] = row["train/loss"]
            fields |= {item.key or ".".join(item.nested_key): item.value_json for item in
                       (*record.config.update, *record.run.config.update)}
    assert fields["optim.lr"] == "0.05", fields
    return losses


def records(data: bytes) -> Iterator[bytes]:
    """Yields the records of a log as LevelDB writes it, after W&B's own 7 bytes of header."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:  # blocks of 32 KiB end in padding
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
