"""One process of a run of several: `python peer.py WORKDIR COORDINATOR PROCESSES PROCESS HEARTBEAT [FIELDS]`.

It trains a tiny model on cached batches, hence without TensorFlow. Images have the colors of their labels, but for some
of the evaluation: how many answers are right is known beforehand, on any processor. Which example each row of each step
was is appended to <WORKDIR>.ids.<PROCESS>, and of each batch of an evaluation to <WORKDIR>.evaluated.<PROCESS>. When it
begins it makes <WORKDIR>.begun.<PROCESS>; when it has found the others it makes <WORKDIR>.joined.<PROCESS>. FIELDS is
JSON: config fields to change; besides, 'method' is another one than MAE, 'devices' permutes the devices,
'start_seconds' is how long to wait for all, 'pause' how many seconds each batch takes, and 'only' has more fields for
single processes; 'workdir' is where the run is kept instead, as gs://bucket/run, 'lease' the seconds after which a
lease is renewed and taken over, and 'save_seconds' those that a save may take.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax._src import compiler
from jax._src.distributed import global_state as state

from mae_jax import data
from mae_jax.commands import cli
from mae_jax.data.readers.cached_batches import hiding
from mae_jax.runtime import discovery, exit, peers, sharding
from mae_jax.storage import checkpoint, leases
from mae_jax.training import loop
from tests.helpers.tiny import raster_batch, tinted, tiny_batch, tiny_config, tiny_method

STEPS = 20
END = "."  # of a line that was written whole: a disk may be full
SIZES = {"train": 48, "support": 32, "evaluate": 27}
WRONG = 4  # every such example of the evaluation has another label than its color, beginning with the first
TOP1 = 20 / 27  # hence: what whoever goes by colors is right about


def small_config(folder: Path, fields: dict | None = None):
    """Returns a config that trains on <folder>/batches_<method>, written when they are not there, or on data.source."""
    fields = dict(fields or {})
    method = fields.pop("method", "mae")
    batches = folder / f"batches_{method}"
    config = tiny_config({
        "batch_size": 16, "train.duration": f"{STEPS} steps", "optim.ema": 0.9, "optim.lr": 0.001,
        "checkpoint.every": "4 steps", "checkpoint.keep_last": 2, "log.every": "4 steps", "data.source": "batches",
        "data.path": str(batches), "data.eval_split": "", "eval.max_examples": 100, **fields}, method)
    if config.data.source == "batches":
        write_batches(batches, config)
    return config


def write_batches(folder: Path, config) -> None:
    if folder.exists():
        return
    parts, method = {}, tiny_method(config)
    order = method.patch_order()
    for seed, (name, size) in enumerate(SIZES.items()):
        views = name == "train" and method.views()
        make = raster_batch if order.kind == "identity" and not views else tiny_batch
        batches = [tinted(make(config, seed=100 * seed + number)) for number in range(-(-size // config.batch_size))]
        parts[name] = {key: np.concatenate([batch[key] for batch in batches])[:size] for key in batches[0]}
        parts[name]["id"] = np.arange(size, dtype=np.int32)
    wrong = parts["evaluate"]["label"][::WRONG]
    wrong[:] = (wrong + 1) % 3
    folder.mkdir(parents=True)
    for name, arrays in parts.items():
        np.savez(folder / f"{name}.npz", **arrays)
    meta = {"classes": ["a", "b", "c"], "num_train": SIZES["train"], **hiding(order, method.views())}
    (folder / "meta.json").write_text(json.dumps(meta))


def recording(make, folder: str, process: str, pause: float):
    """Wraps `OpenedData.batches`: every batch that is drawn leaves a line 'step row:id row:id ... .', after a pause."""
    def noted(batches: Iterator, start: int, rows: np.ndarray, kind: str) -> Iterator:
        for step, batch in enumerate(batches, start):
            time.sleep(pause)
            pairs = zip(rows, batch["id"], strict=True)
            with open(f"{folder}.{kind}.{process}", "a") as out:
                out.write(" ".join(["\n", str(step), *(f"{row}:{number}" for row, number in pairs), END]) + "\n")
            yield batch

    def wrapped(opened, spec, order, views, rows):
        inputs = make(opened, spec, order, views, rows)
        return inputs._replace(train=lambda start: noted(inputs.train(start), start, rows, "ids"),
                               evaluate=lambda: noted(inputs.evaluate(), 0, rows, "evaluated"))

    return wrapped


def cached_everywhere() -> None:
    """Lets all processes keep what they compile: JAX lets process 0 alone, whose programs CPU peers cannot use."""
    write = compiler._cache_write

    def writing(*args, **kwargs) -> None:
        number, state.process_id = state.process_id, 0
        try:
            write(*args, **kwargs)
        finally:
            state.process_id = number

    compiler._cache_write = writing


def main() -> int:
    folder, coordinator, processes, process, heartbeat = sys.argv[1:6]
    Path(f"{folder}.begun.{process}").touch()
    fields = json.loads(sys.argv[6]) if len(sys.argv) > 6 else {}
    fields |= fields.pop("only", {}).get(process, {})
    permutation, start_seconds = fields.pop("devices", None), fields.pop("start_seconds", 60)
    if permutation:
        make = sharding.make_mesh
        sharding.make_mesh = lambda config, _: make(config, [jax.devices()[number] for number in permutation])
    data.OpenedData.batches = recording(data.OpenedData.batches, folder, process, fields.pop("pause", 0.0))
    leases.RENEWED, leases.DEAD = fields.pop("lease", (leases.RENEWED, leases.DEAD))
    checkpoint.SAVE_SECONDS = fields.pop("save_seconds", checkpoint.SAVE_SECONDS)
    workdir = fields.pop("workdir", folder)
    config = small_config(Path(folder).parent, fields)
    cached_everywhere()
    here = discovery.find(coordinator, int(processes), int(process))
    if here is None:
        return loop.train(config, workdir)

    def command() -> int:
        Path(f"{folder}.joined.{process}").touch()
        return loop.train(config, workdir)

    return peers.launch(command, here, {"workdir": folder}, start_seconds, float(heartbeat))


if __name__ == "__main__":
    exit.exit_process(cli.guarded(main))
