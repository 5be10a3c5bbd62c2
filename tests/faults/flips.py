"""Single bytes changed at random in all files of a checkpoint: `python -m tests.faults.flips FLIPS SEED`.

The state is a trained one, cut over all devices of the process. Each flip is of one byte of the newest of two steps.
FLIPS of them are in any file, which is drawn first, so that small ones are struck as often as large ones; what they
hit may be of no use, as the names of devices are. As many more are in array data, where each must be noticed. Prints
JSON: of both kinds, how many restores gave the newest step bit for bit, and how many refused it by name and gave the
one before; and what was anything else.
"""

import itertools
import json
import logging
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from mae_jax.storage.checkpoint import Checkpoints
from mae_jax.training import loop, workdir
from mae_jax.training import run as training_run
from tests.helpers.tiny import tiny_config

ZSTD = re.compile(re.escape(b"\x28\xb5\x2f\xfd"))  # what each compressed piece begins with


def trained(folder: Path) -> dict[int, list[bytes]]:
    """Trains a run that keeps two steps; returns step → the bytes of all leaves."""
    config = tiny_config({"mesh.data": 1, "mesh.fsdp": -1, "model.width": 64, "model.heads": 4, "optim.ema": 0.9,
                          "optim.lr": 0.001, "batch_size": 16, "train.duration": "4 steps", "eval.every": "",
                          "checkpoint.every": "2 steps"})
    assert loop.train(config, str(folder)) == 0
    states = {}
    for step in (4, 2):
        states[step] = bits(restored(folder, config))
        shutil.move(folder / "checkpoints" / str(step), folder / str(step))
    for step in (2, 4):
        shutil.move(folder / str(step), folder / "checkpoints" / str(step))
    return states


def restored(folder: Path, config):
    return Checkpoints(folder, 2).restore(training_run.prepare(config, folder).program.state)


def bits(state) -> list[bytes]:
    return [np.asarray(jax.device_get(leaf)).tobytes() for leaf in jax.tree.leaves(state)]


def anywhere(files: list[Path], draws: random.Random) -> tuple[Path, int]:
    """Returns a file and the place of one of its bytes."""
    file = draws.choice(files)
    return file, draws.randrange(file.stat().st_size)


def in_arrays(files: list[Path], draws: random.Random) -> tuple[Path, int]:
    """Returns a file and a place in the middle of a compressed piece of an array.

    There are the values themselves, each coded by its own bits: to change a bit is to change a value, or to leave
    nothing that can be decoded. Heads of pieces have bits without a meaning.
    """
    middles = []
    for file in files:
        starts = [match.start() for match in re.finditer(ZSTD, file.read_bytes())]
        # What follows the last piece of a file is no array.
        middles += [(file, (start + end) // 2) for start, end in itertools.pairwise(starts) if end - start > 1000]
    return draws.choice(middles)


def main(flips: int, seed: int) -> dict[str, int | list[str] | dict[str, int]]:
    draws, heard = random.Random(seed), []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("mae_jax").addHandler(handler)
    found = {"devices": jax.device_count(), "wrong": []}
    with tempfile.TemporaryDirectory() as scratch:
        good, run = Path(scratch) / "good", Path(scratch) / "run"
        states = trained(good)
        program = training_run.prepare(workdir.read_config(good), good).program
        inside = (path for path in (good / "checkpoints" / "4").rglob("*") if path.is_file())
        files = sorted(path for path in inside if path.stat().st_size)
        for place in [anywhere, in_arrays] * flips:
            count = found.setdefault(place.__name__, {"equal": 0, "refused": 0})
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(good, run)
            file, at = place(files, draws)
            file = run / file.relative_to(good)
            content, heard[:] = bytearray(file.read_bytes()), []
            content[at] ^= draws.randrange(1, 256)
            file.write_bytes(content)
            state = Checkpoints(run, 2).restore(program.state)
            named = any("step 4 refused" in line for line in heard)
            if int(state.step) == 4 and bits(state) == states[4] and not named:
                count["equal"] += 1
            elif int(state.step) == 2 and bits(state) == states[2] and named:
                count["refused"] += 1
            else:
                found["wrong"].append(f"byte {at} of {file.relative_to(run)}: step {state.step}")
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
