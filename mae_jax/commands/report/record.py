"""Reads the workdir of a run, finished or not, for the page; executes and changes nothing in it."""

import math
import re
import time
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from mae_jax.config import changed, with_fitting_mesh
from mae_jax.errors import UserError, pluralize, printable, root_cause
from mae_jax.runtime import bounded_json
from mae_jax.runtime.console import clock
from mae_jax.storage import paths
from mae_jax.storage.metric_writer import series_of
from mae_jax.training import ending, workdir
from mae_jax.training.curves import Points

FIGURE = re.compile(r"(.+)_(\d{7,18})\.png")  # names of storage/png_files.py
GUARD = re.compile(r"guard_(\d{1,18})\.json")  # names of training/guards.py
UNTIMED = ("train/images_per_sec", "train/data_wait", "train/mfu")  # not finite for steps that were not timed


class Record(NamedTuple):
    """The record of a run.

    Attributes:
      name: its name on the page: the shortest end of its path that is unique.
      path: its workdir.
      config: its config.
      changed: the config fields that differ from the defaults.
      stored: the content of config.json.
      series: metric → (step, value) points.
      figures: name → (step, file), ascending.
      guards: the steps at which a guard stopped the run.
      state: its progress, in words.
    """

    name: str
    path: epath.Path
    config: ConfigDict
    changed: dict[str, Any]
    stored: dict[str, Any]
    series: dict[str, Points]
    figures: dict[str, list[tuple[int, epath.Path]]]
    guards: list[int]
    state: str


def read(folder: str, name: str) -> Record:
    """Reads a workdir, local or gs://, or the workdir of a checkpoint; raises UserError if there is none."""
    path = workdir.of_checkpoint(paths.locate_checkpoints(folder, "--from"))
    config = workdir.read_config(path)
    try:
        stored = bounded_json.parse_object(paths.read_there(path / "config.json"))
    except ValueError as error:
        raise UserError(f"{path / 'config.json'} is damaged: {error}") from None
    series, times = series_of(paths.read_bytes(path / "metrics.jsonl") or b"")
    guards = sorted(int(found[1]) for found in map(GUARD.fullmatch, _names(path)) if found)
    return Record(name, path, config, changed(config), stored, series, _figures(path / "pictures"), guards,
                  _state(path, config, times))


def names_of(folders: list[str]) -> list[str]:
    """Returns the shortest unique ends of the paths, all of equal length; raises UserError for a path given twice."""
    parts = [[part for part in folder.rstrip("/").split("/") if part] or [folder] for folder in folders]
    length = next((n for n in range(1, max(map(len, parts), default=0) + 2)
                   if len({tuple(each[-n:]) for each in parts}) == len(parts)), None)
    if length is None:
        raise UserError("--from names a run twice; give each once")
    return [printable("/".join(each[-length:])) for each in parts]


def _names(folder: epath.Path) -> list[str]:
    """Returns the names of the files in a folder; [] if it does not exist."""
    if str(folder).startswith("gs://"):
        from mae_jax.storage import gcs

        return gcs.names(str(folder))
    return [file.name for file in folder.iterdir()] if folder.is_dir() else []


def _figures(folder: epath.Path) -> dict[str, list[tuple[int, epath.Path]]]:
    found: dict[str, list[tuple[int, epath.Path]]] = {}
    for match in sorted(filter(None, map(FIGURE.fullmatch, _names(folder))), key=lambda match: int(match[2])):
        found.setdefault(match[1], []).append((int(match[2]), folder / match[0]))
    return dict(sorted(found.items()))


def _state(path: epath.Path, config: ConfigDict, times: dict[int, float]) -> str:
    done = ending.finished(path)
    if not times:
        return f"finished at step {done:,}, without figures" if done else "no figures yet"
    last = max(times)
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(times[last]))
    took = clock(max(times.values()) - min(times.values()))
    if done:
        early = ending.early_end(path)
        why = f", early, since {early}" if early else ""
        return f"finished at step {done:,} on {when}{why}; {took} from its first figures to its last"
    return f"not finished: its last figures are of step {last:,}, {when}; to last {config.train.duration}"


def parameters(record: Record) -> str:
    """Returns the table of a run's parameters, one line for each kind of part, or the reason why there is none."""
    import jax

    from mae_jax import methods
    from mae_jax.config import resolved
    from mae_jax.data import DataInfo
    from mae_jax.training import parameter_table

    data = workdir.recorded_data(record.path)
    info = DataInfo(data.get("pictures") or 0, tuple(data.get("classes") or ()),
                    bool(record.config.method.get("multi_label")))
    try:
        method = methods.build(resolved(with_fitting_mesh(record.config)), info)
        params, _ = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
        return parameter_table.summary(params, method)
    except (UserError, ImportError) as error:  # missing data, or a missing plug-in
        return f"not known here: {root_cause(error)}"


def troubles(record: Record) -> list[str]:
    """Returns the faults of a run, one line each: replaced images, bad or skipped steps, metrics that were not finite,
    and guards."""
    found, series = [], record.series
    if any(value > 0 for _, value in series.get("train/replaced", ())):
        values = [value / record.config.batch_size for _, value in series["train/replaced"]]
        found.append(f"{sum(values) / len(values):.3%} of the images to train on could not be read, and were replaced")
    for name, what in (("train/bad_steps", "with a loss or gradients that are not finite"),
                       ("train/spikes", "that stand out by a spike (guard.spike)")):
        if steps := [step for step, value in series.get(name, ()) if value > 0]:
            found.append(f"steps {what}, before {pluralize(len(steps), 'logged step')}, first before {steps[0]:,}")
    for name, points in record.series.items():
        gone = [step for step, value in points if math.isnan(value)]
        if gone and name not in UNTIMED:
            found.append(f"{name} was not finite at {pluralize(len(gone), 'logged step')}, first at {gone[0]:,}")
    return found + [f"a guard stopped it at step {step:,} (guard_{step}.json)" for step in record.guards]
