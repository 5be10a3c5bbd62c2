"""What version 0.1.0 left on record is what this code does: runs anew, resumed, evaluated, exported and read.

`make_record.py` made the record and says what is in it. Ids and digests of batches, names of metrics, and paths, shapes
and types in checkpoints are compared exactly. Values are compared to 1e-6, since processors add in other orders; the
runs are made so tame (few steps, low rates, a large eps) that this is above what that changes, and far below what 20
steps do to a parameter, some 1e-3. That holds for attention's key bias too, whose gradient is zero by theory.
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mae_jax.interop.hf import from_hf
from mae_jax.param_tree import flatten
from tests.golden import runs
from tests.golden.runs import METHODS, RECORD, STOP, TOTAL, Arrays

pytestmark = pytest.mark.slow

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
EXPORTS = {  # file or folder → the method whose workdir it is of, its layout
    "mae.safetensors": ("mae", "mae_jax"), "mae_of_mae.safetensors": ("mae", "mae"),
    "mae_of_timm.safetensors": ("mae", "timm"), "mae_of_hf/model.safetensors": ("mae", "hf"),
    "dino.safetensors": ("dino", "mae_jax"), "dino_of_timm.safetensors": ("dino", "timm"),
    "moce.safetensors": ("moce", "mae_jax"), "splitmask_of_timm.safetensors": ("splitmask", "timm"),
    "supervised_of_timm.safetensors": ("supervised", "timm"),
}


class Trained(NamedTuple):
    """The end of a run, and what the record says of it."""

    workdir: Path
    wanted: dict[str, Any]
    arrays: Arrays
    evaluated: int  # the last step that 0.1.0 evaluated, -1 for none: it was stopped before it evaluated step STOP


@pytest.fixture(autouse=True, scope="module")
def _in_the_record() -> Iterator[None]:
    """The record's configs name data by paths relative to it."""
    with contextlib.chdir(RECORD):
        yield


def copied(method: str, to: Path) -> Path:
    """Returns a copy of the workdir of 0.1.0 that was stopped in the middle."""
    shutil.copytree(RECORD / "workdirs" / method, to)
    return to


@pytest.fixture(params=[(method, kind) for method in METHODS for kind in ("fresh", "resumed")],
                ids=lambda param: "-".join(param))
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> Trained:
    """Trains a method's 20 steps anew, or the last 10 of them in the workdir that 0.1.0 left."""
    method, kind = request.param
    config = runs.stored_config(RECORD / "workdirs" / method)
    workdir = tmp_path / "run"
    if kind == "resumed":
        copied(method, workdir)
    assert runs.train(config, workdir) == 0
    with np.load(RECORD / "runs" / f"{method}.npz") as stored:
        wanted = json.loads((RECORD / "runs" / f"{method}.json").read_text())
        return Trained(workdir, wanted, dict(stored), 0 if kind == "resumed" else -1)


def test_a_run_goes_where_that_of_the_record_went(trained):
    found = runs.measured(trained.workdir)
    assert found["folders"] == trained.wanted["folders"]
    assert {name: item[:2] for name, item in found["items"].items()} == {
        name: item[:2] for name, item in trained.wanted["items"].items()}
    check_metrics(found["metrics"], trained.wanted["metrics"], trained.evaluated)
    check_arrays(runs.saved(trained.workdir), trained.arrays)


def check_metrics(found: dict[str, Any], wanted: dict[str, Any], evaluated: int) -> None:
    """Names are the record's, past step `evaluated` with the added ones; values of training and losses are near."""
    names = {step: with_added(values) if int(step) > evaluated else set(values) for step, values in wanted.items()}
    of_pixels = {name for name in wanted.get("0", {}) if name.endswith("/pixels_top1")}
    if evaluated < 0:  # 0.1.0 measured raw pixels with the first evaluation; they are measured with the last one since
        names.get("0", set()).difference_update(of_pixels)
    names[str(TOTAL)] |= of_pixels
    assert {step: set(values) for step, values in found.items()} == names
    assert len([step for step in wanted if "train/loss" in wanted[step]]) == TOTAL
    for step, values in wanted.items():
        names = [name for name, value in values.items()
                 if value is not None and (name.startswith("train/") or name.endswith("loss"))]
        np.testing.assert_allclose([found[step][name] for name in names], [values[name] for name in names],
                                   **CLOSE, err_msg=f"step {step}: {names}")


def with_added(names: Iterable[str]) -> set[str]:
    """Returns the metrics of a step in the record, and what evaluations have given since 0.1.0.

    RankMe, wherever a method was evaluated that learns without labels: those that have neither classes nor pixels'.
    """
    names = set(names)
    judged = {name.rpartition("/")[0] for name in names if name.endswith("/loss") and not name.startswith("train/")}
    return names | {f"{part}/rankme" for part in judged if not names & {f"{part}/top1", f"{part}/miou"}}


def check_arrays(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, **CLOSE, err_msg=name)


@pytest.mark.parametrize("start", [0, STOP], ids=["fresh", "resumed"])
@pytest.mark.parametrize("method", METHODS)
def test_batches_are_those_of_the_record(method, start):
    wanted = json.loads((RECORD / "runs" / f"{method}.json").read_text())
    found = runs.inputs(runs.stored_config(RECORD / "workdirs" / method), start, TOTAL - start)
    assert found["ids"] == wanted["ids"][start:]
    assert found["digests"] == wanted["digests"][start:]


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_workdir_is_evaluated(method, tmp_path):
    wanted = json.loads((RECORD / "runs" / f"{method}.json").read_text())["evaluated"]
    workdir = copied(method, tmp_path / "run")
    assert runs.evaluate(workdir) == 0
    found = runs.metrics(workdir)[str(STOP)]
    assert {name for name in found if name.startswith("eval/")} == with_added(wanted)
    losses = [name for name in wanted if name.endswith("loss")]
    assert losses
    np.testing.assert_allclose([found[name] for name in losses], [wanted[name] for name in losses], **CLOSE)


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_of_a_stopped_workdir_are_those_of_the_record(name, tmp_path):
    method, layout = EXPORTS[name]
    file = tmp_path / name
    assert runs.export(RECORD / "workdirs" / method, file.parent if layout == "hf" else file, layout) == 0
    found, stored = runs.parameters(file), runs.parameters(RECORD / "exports" / name)
    if layout == "hf":  # 0.1.0 wrote the names of transformers 5, which version 4 does not load
        found, stored = (flatten(from_hf(each)) for each in (found, stored))
    check_arrays(found, stored)
    if layout == "mae_jax":
        check_arrays(found, runs.parameters(RECORD / "workdirs" / method))


def test_a_whole_checkpoint_is_exported(tmp_path):
    assert runs.export(RECORD / "workdirs" / "mae", tmp_path / "whole") == 0
    assert runs.items(tmp_path / "whole", STOP) == runs.items(RECORD / "workdirs" / "mae", STOP)
    assert runs.stored_config(tmp_path / "whole") == runs.stored_config(RECORD / "workdirs" / "mae")


def test_an_encoder_of_a_mixture_is_exported_for_a_task(tmp_path):
    task = runs.stored_config(RECORD / "workdirs" / "mae")
    assert runs.export_for_task(RECORD / "workdirs" / "moce", tmp_path / "task.safetensors", task) == 0
    check_arrays(runs.parameters(tmp_path / "task.safetensors"),
                 runs.parameters(RECORD / "exports" / "moce_for_task.safetensors"))


@pytest.mark.parametrize(("name", "of"), [
    ("exports/mae.safetensors", "mae"), ("exports/mae_of_mae.safetensors", "mae"),
    ("exports/mae_of_timm.safetensors", "mae"), ("exports/mae_of_hf/model.safetensors", "mae"),
    ("exports/dino.safetensors", "dino"), ("exports/dino_of_timm.safetensors", "dino"),
    ("clusters/encoder.safetensors", "mae"), ("workdirs/mae", "mae"), ("workdirs/mae/checkpoints/10", "mae")])
def test_a_run_starts_from_what_the_record_holds(name, of):
    """A MAE's encoder gets the parameters that the workdir has, whatever the layout."""
    config = runs.stored_config(RECORD / "workdirs" / "mae")
    found, stored = runs.warm_start(config, RECORD / name), runs.parameters(RECORD / "workdirs" / of)
    encoder = {path for path in stored if path.startswith("encoder/")}
    assert len(encoder) == 29
    check_arrays({path: found[path] for path in encoder}, {path: stored[path] for path in encoder})


def test_a_run_trains_on_cached_batches(tmp_path):
    config = runs.changed(runs.stored_config(RECORD / "workdirs" / "mae"),
                          {"data.source": "batches", "data.path": "batches"})
    wanted = json.loads((RECORD / "runs" / "mae.json").read_text())
    found = runs.inputs(config, 0, 4)
    assert found == {"ids": wanted["ids"][:4], "digests": wanted["digests"][:4]}
    assert runs.train(config, tmp_path / "run") == 0
    for step in map(str, range(1, 5)):  # afterwards the four batches come again
        np.testing.assert_allclose(runs.metrics(tmp_path / "run")[step]["train/loss"],
                                   wanted["metrics"][step]["train/loss"], **CLOSE)
