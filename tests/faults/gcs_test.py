"""Whole runs in a bucket, over HTTP: through bursts, kills and refusals they end with the bits of a run on a disk."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from mae_jax.commands import cli
from mae_jax.commands.export import weights
from mae_jax.errors import UserError
from mae_jax.param_tree import flatten
from mae_jax.storage import gcs as storage_gcs
from mae_jax.storage.checkpoint import Checkpoints
from mae_jax.training import loop
from mae_jax.training import run as training_run
from mae_jax.training import workdir as training_workdir
from tests.faults import peer
from tests.faults.processes import ends, output, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FIELDS = {"data.eval_split": "test", "eval.every": "20 steps", "eval.max_examples": 16}
LEASE = [0.3, 3.0]  # seconds after which a lease is renewed, and taken over
TOKEN = "ya29.not-to-be-seen"


@pytest.fixture(scope="module")
def place(tmp_path_factory, _in_gcs) -> Path:
    """Where processes keep their notes; they have a token that must not be seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", TOKEN)
        storage_gcs.check("gs://bucket")
        yield tmp_path_factory.mktemp("runs")


def begin(place: Path, name: str, **fields) -> subprocess.Popen:
    """Starts gs://bucket/<name>."""
    where = {} if name == "golden" else {"workdir": f"gs://bucket/{name}", "lease": LEASE}
    [process] = start(place / name, place / "compiled", 1, 1, FIELDS | where | fields)
    return process


def finish(place: Path, name: str, code: int = 0, **fields) -> str:
    """Runs to the end; returns the output."""
    codes = ends([begin(place, name, **fields)])
    text = output(place / name, 0)
    assert codes == [code], text
    assert TOKEN not in text
    assert "Traceback" not in text
    return text


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state_of(workdir_: str | Path) -> dict[str, bytes]:
    """Returns all bits of the newest checkpoint."""
    run = training_run.prepare(training_workdir.read_config(epath.Path(workdir_)), epath.Path(workdir_))
    state = Checkpoints(workdir_, 2).restore(run.program.state)
    return {name: np.asarray(jax.device_get(leaf)).tobytes() for name, leaf in flatten(state).items()}


@pytest.fixture(scope="module")
def golden(place) -> dict[str, bytes]:
    """The state of an undisturbed run on a disk."""
    finish(place, "golden")
    return state_of(place / "golden")


def committed(gcs, name: str) -> list[int]:
    found = gcs.store.list("bucket", {"prefix": f"{name}/checkpoints/"})["items"]
    return sorted(int(item["name"].split("/")[2]) for item in found if item["name"].count("/") == 3
                  and item["name"].endswith("commit_success.txt"))


def logged(name: str) -> list[int]:
    """Returns the steps of the lines of training in metrics.jsonl."""
    lines = map(json.loads, storage_gcs.read(f"gs://bucket/{name}/metrics.jsonl").content.splitlines())
    return [line["step"] for line in lines if "train/loss" in line]


def check_like(golden: dict[str, bytes], name: str) -> None:
    """Asserts that a run ended with the bits of the golden one and with each of its lines once."""
    assert logged(name) == list(range(4, peer.STEPS + 1, 4))
    state = state_of(f"gs://bucket/{name}")
    assert [path for path in golden if state[path] != golden[path]] == []


def test_a_run_in_a_bucket_resumes_to_the_bits_of_one_on_a_disk_and_leaves_the_same(place, golden, gcs, capsys):
    process = begin(place, "whole", pause=0.1)
    wait_until(lambda: 8 in committed(gcs, "whole"), process)
    process.terminate()
    assert process.wait(30) == 75
    for fault in ({"path": "whole/config.json", "kind": "flip"}, {"path": "whole/metrics.jsonl", "kind": "reset"},
                  {"path": "whole/checkpoints/.*/d/"}, {"path": "whole/checkpoints/.*/d/", "kind": "cut"}):
        gcs.add({"method": "GET", **fault})
    assert f"resumed at step {committed(gcs, 'whole')[-1]}" in finish(place, "whole")
    assert all(fault.done for fault in gcs.faults)
    check_like(golden, "whole")
    assert committed(gcs, "whole") == [16, 20]
    assert storage_gcs.read("gs://bucket/whole/DONE").content == b"20\n"
    found = {item["name"].removeprefix("whole/") for item in gcs.store.list("bucket", {"prefix": "whole/"})["items"]}
    ours = {str(path.relative_to(place / "golden")) for path in (place / "golden").rglob("*") if path.is_file()}
    outside = {name for name in found if not name.startswith("checkpoints/")}
    assert outside | {"lock"} == {name for name in ours if not name.startswith("checkpoints/")}
    assert any(name.startswith("pictures/reconstruct_") for name in outside)
    assert "is finished: step 20 of 20" in finish(place, "whole")
    assert weights.export("gs://bucket/whole", "gs://bucket/copied", "mae_jax") == 0
    assert state_of("gs://bucket/copied") == golden
    assert loop.evaluate("gs://bucket/copied") == 0
    lines = [json.loads(storage_gcs.read(f"gs://bucket/{name}/metrics.jsonl").content.splitlines()[-1])
             for name in ("whole", "copied")]
    assert lines[0]["eval/loss"] == pytest.approx(lines[1]["eval/loss"], rel=1e-5)
    everything = b"".join(stored.content for stored in gcs.store.buckets["bucket"].values())
    assert TOKEN.encode() not in everything


def test_bursts_resets_and_refused_deletions_do_not_touch_training(place, golden, gcs):
    for fault in ({"path": "checkpoints/4/.*d/", "status": 503}, {"path": "checkpoints/8/.*manifest", "status": 429},
                  {"path": "checkpoints/8/.*d/", "kind": "reset"}, {"path": "metrics", "method": "POST"},
                  {"path": "config.json", "method": "POST"}, {"path": "pictures", "kind": "lost"},
                  {"path": "DONE", "method": "POST", "kind": "reset"}):
        gcs.add(fault)
    gcs.add({"path": "checkpoints/4", "method": "DELETE", "status": 403, "times": -1})
    text = finish(place, "bursts")
    assert all(fault.done for fault in gcs.faults)
    assert "could not delete the old checkpoint of step 4" in text
    check_like(golden, "bursts")
    assert committed(gcs, "bursts") == [4, 16, 20]


def test_kill_9_in_the_middle_of_an_upload_goes_on_from_the_step_before(place, golden, gcs):
    gcs.add({"path": "checkpoints/8/", "method": "POST", "kind": "slow", "seconds": 0.2, "times": -1})
    process = begin(place, "killed")
    wait_until(lambda: gcs.faults[0].done > 3, process)
    process.kill()
    process.wait()
    assert committed(gcs, "killed") == [4]
    gcs.clear()
    text = finish(place, "killed")
    assert "waiting up to 3 s to see whether that run is alive" in text
    assert "resumed at step 4" in text
    check_like(golden, "killed")


def test_a_run_that_was_frozen_and_overtaken_ends_when_it_wakes_and_harms_nothing(place, golden, gcs):
    process = begin(place, "frozen", pause=0.1)
    wait_until(lambda: 8 in committed(gcs, "frozen"), process)
    process.send_signal(signal.SIGSTOP)
    frozen = output(place / "frozen", 0)
    (place / "frozen.out.0").rename(place / "frozen.out.first")
    text = finish(place, "frozen")
    assert "took over gs://bucket/frozen/lock" in text
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) == 3
    told = (place / "frozen.out.first").read_text().removeprefix(frozen)
    assert "stopped: gs://bucket/frozen was taken over by a run that has ended since" in told
    assert "Traceback" not in told
    check_like(golden, "frozen")


@pytest.mark.parametrize("when", ["while it is taken", "when it is held"])
def test_a_signal_before_the_first_step_gives_the_lease_back(place, golden, gcs, when):
    workdir = f"signalled {when}".replace(" ", "_")
    gcs.add({"path": f"{workdir}/lock", "method": "POST", "kind": "slow", "seconds": 1.0})
    process = begin(place, workdir, pause=0.5)
    taken = re.compile("POST .*/lock" if when == "while it is taken" else "POST .*/config.json")
    wait_until(lambda: any(workdir in request and taken.search(request) for request in gcs.requests), process)
    process.terminate()
    assert process.wait(30) == 75
    assert gcs.faults[0].done == 1
    time.sleep(1.5)  # what was asked for before the end is done by then
    assert storage_gcs.read(f"gs://bucket/{workdir}/lock") is None


def test_a_bucket_that_stops_answering_stops_no_training_and_is_told_at_the_end(place, golden, gcs):
    gcs.add({"path": "checkpoints/12/.*d/|checkpoints/16/.*d/|checkpoints/20/.*d/", "method": "POST", "kind": "slow",
             "seconds": 60, "times": -1})
    began = time.monotonic()
    text = finish(place, "silent", code=2, save_seconds=4)
    assert time.monotonic() - began < 120  # four answers of 60 s, had it waited for them
    for step in (12, 16, 20):
        assert f"checkpoint of step {step} not saved: TimeoutError" in text
    assert text.count("training goes on, earlier checkpoints stay") == 4  # the last save is tried again
    assert "the state of step 20 could not be saved" in text
    assert "it goes on from step 8" in text
    gcs.clear()
    assert "resumed at step 8" in finish(place, "silent")
    check_like(golden, "silent")


def test_cached_batches_in_a_bucket_are_those_of_a_disk_and_damage_is_told(place, gcs):
    config = peer.small_config(place, FIELDS)
    for file in Path(config.data.path).iterdir():
        storage_gcs.write(f"gs://bucket/batches/{file.name}", file.read_bytes())
    local = next(training_run.prepare(config, place / "unused").inputs.train(5))
    config.data.path = "gs://bucket/batches"
    gcs.add({"path": "train.npz", "kind": "flip"})
    remote = next(training_run.prepare(config, place / "unused").inputs.train(5))
    assert all(np.array_equal(local[name], remote[name]) for name in local)
    gcs.add({"path": "train.npz", "kind": "flip", "times": -1})
    with pytest.raises(UserError, match=r"train\.npz: .*twice"):
        training_run.prepare(config, place / "unused")


@pytest.mark.usefixtures("_restored_logging")
@pytest.mark.parametrize(("name", "fault", "words"), [
    ("bucket", {"path": "/o[?]", "status": 403}, "access denied"),
    ("bukket", None, "there is no bucket gs://bukket"),
    ("bucket", {"path": "upload.*lock", "status": 403}, "cannot write the workdir: gs://bucket/run/lock: access"),
    ("bucket", {"path": "/o[?]", "kind": "slow", "seconds": 3}, "no answer within 1 s"),
])
def test_a_bucket_that_will_not_do_is_told_before_anything_is_compiled(place, gcs, monkeypatch, capsys, name, fault,
                                                                       words):
    monkeypatch.setattr(storage_gcs, "CHECK_SECONDS", 1.0)
    monkeypatch.setattr("mae_jax.training.train_step.TrainStep.compile", None)
    if fault:
        gcs.add({"times": -1, **fault})
    config = peer.small_config(place, FIELDS)
    began = time.monotonic()
    assert cli.guarded(lambda: loop.train(config, f"gs://{name}/run")) == 2
    assert time.monotonic() - began < 10
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("error: ")
    assert f"gs://{name}/run" in line
    assert words in line


def test_a_second_living_run_on_a_disk_is_refused_and_a_killed_one_keeps_nobody_out(place, golden):
    process = begin(place, "first", workdir=str(place / "disk"), pause=0.2)
    wait_until((place / "disk" / "config.json").exists, process)
    text = finish(place, "second", code=2, workdir=str(place / "disk"))
    assert f"error: {place}/disk is in use by another run: process {process.pid} on {os.uname().nodename}" in text
    process.kill()
    process.wait()
    finish(place, "third", workdir=str(place / "disk"))
    assert state_of(place / "disk") == golden
