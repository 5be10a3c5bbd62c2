"""What the golden record needs of the package: the one place to follow when modules, functions or fields move.

All paths are relative to the record's folder, as those in its configs are: call these functions from there.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

RECORD = Path(__file__).parent / "record"
METHODS = ("beit", "dino", "mae", "mixedae", "moce", "segment", "splitmask", "supervised")
TOTAL, STOP = 20, 10  # steps of a run, and the one where the workdirs of the record were stopped
PIXELS = "pixel_label"  # the batch field of classes per pixel
TIMED = ("train/images_per_sec", "train/data_wait", "train/mfu")  # metrics that differ from run to run
Arrays = dict[str, np.ndarray]


def stored_config(workdir: str | Path) -> ConfigDict:
    """Returns the config of a workdir, read as a resumed run reads it: old names of fields are mapped there."""
    from mae_jax.storage import paths
    from mae_jax.training import workdir as workdirs

    return workdirs.read_config(paths.locate(str(workdir)))


def changed(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of a config with dotted fields changed."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(fields))
    return config


def train(config: ConfigDict, workdir: Path) -> int:
    """Trains or resumes a run. Returns the exit code."""
    from mae_jax.training import loop

    return loop.train(config, str(workdir))


def evaluate(workdir: Path) -> int:
    """Does what --mode=eval does. Returns the exit code."""
    from mae_jax.training import loop

    return loop.evaluate(str(workdir))


def export(source: Path, to: Path, layout: str = "mae_jax") -> int:
    """Exports parameters, or with a folder as `to` a whole checkpoint. Returns the exit code."""
    from mae_jax.commands.export import weights

    return weights.export(str(source), str(to), layout)


def export_for_task(source: Path, to: Path, task: ConfigDict) -> int:
    """Exports the path of experts that the task's images vote for. Returns the exit code."""
    from mae_jax.commands.export import weights

    return weights.export(str(source), str(to), "mae_jax", task, "vote")


def batches(config: ConfigDict, start: int, count: int) -> list[Arrays]:
    """Returns the batches of the steps start, ..., start + count - 1."""
    from mae_jax.storage import paths
    from mae_jax.training.run import prepare

    run = prepare(config, paths.locate("unwritten"))
    return list(islice(run.inputs.train(start), count))


def parameters(source: Path) -> Arrays:
    """Returns path → array of what evaluations would use of a workdir, or of an exported file."""
    from mae_jax.param_tree import flatten, split_eval_params
    from mae_jax.storage.checkpoint import load_params

    params, _ = split_eval_params(load_params(source, True, True))
    return {name: np.asarray(leaf) for name, leaf in flatten(params).items()}


def saved(workdir: Path) -> Arrays:
    """Returns path → array of the newest checkpoint: params/..., extras/... and, where there is an average, ema/..."""
    from mae_jax.param_tree import flatten
    from mae_jax.storage.checkpoint import load_params

    last, average = (flatten(load_params(workdir, ema=ema, extras=True)) for ema in (False, True))
    found = {name if name.startswith("extras/") else f"params/{name}": leaf for name, leaf in last.items()}
    if any(name.startswith("ema/") for name in items(workdir)):
        found |= {f"ema/{name}": leaf for name, leaf in average.items() if not name.startswith("extras/")}
    return {name: np.asarray(leaf) for name, leaf in found.items()}


def items(workdir: Path, step: int = TOTAL) -> dict[str, list]:
    """Returns path → shape, dtype and two words of checksum of all that a checkpoint holds, read and verified."""
    from mae_jax.storage import paths
    from mae_jax.storage.checkpoint import read_back

    return read_back(paths.locate(str(workdir / "checkpoints" / str(step))))


def warm_start(config: ConfigDict, source: Path) -> Arrays:
    """Returns path → array of what a run of this config takes from `source` as its init_from."""
    from mae_jax.data import ASSUMED
    from mae_jax.param_tree import flatten
    from mae_jax.training.train_step import build
    from mae_jax.training.warm_start import load

    config = changed(config, {"init_from": str(source)})
    method = build(config, ASSUMED).method
    shapes, _ = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
    ours = flatten(shapes)
    return {name: np.asarray(leaf) for name, leaf in flatten(load(config, shapes)).items() if name in ours}


def metrics(workdir: Path) -> dict[str, dict[str, float | None]]:
    """Returns step → name → value of metrics.jsonl; None for what is not finite, and for what measures time."""
    found: dict[str, dict[str, float | None]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        step, _ = str(values.pop("step")), values.pop("time")
        found.setdefault(step, {}).update(values | dict.fromkeys(set(TIMED) & values.keys()))
    return {step: dict(sorted(values.items())) for step, values in found.items()}


def inputs(config: ConfigDict, start: int = 0, count: int = TOTAL) -> dict[str, list]:
    """Returns of each batch the ids, and a digest of orders, patches and classes of pixels, of all views."""
    found: dict[str, list] = {"ids": [], "digests": []}
    for batch in batches(config, start, count):
        digest = hashlib.sha256()
        for last in ("order", "patches", PIXELS):
            for name in sorted(name for name in batch if name.split("/")[-1] == last):
                digest.update(np.ascontiguousarray(batch[name]).tobytes())
        found["ids"].append(batch["id"].tolist())
        found["digests"].append(digest.hexdigest())
    return found


def measured(workdir: Path) -> dict[str, Any]:
    """Returns what the record says of a finished run, but for its inputs and the values of its parameters."""
    return {"folders": sorted(os.listdir(workdir / "checkpoints" / str(TOTAL))), "items": items(workdir),
            "metrics": metrics(workdir)}
