"""Several real processes over loopback train as one does, evaluate every example once, and end together."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mae_jax.evals.evaluator import Evaluator
from tests.faults import peer
from tests.faults.processes import (
    drawn,
    ends,
    environment,
    finish,
    free_port,
    output,
    restored,
    same,
    start,
    state_of,
    strike,
    wait_for,
)
from tests.helpers import margins

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

# Large enough for its kernels to be cut.
LARGE = {"model.width": 128, "model.depth": 1, "model.heads": 4, "method.decoder_width": 64,
         "method.decoder_heads": 4, "log.every": "1 steps", "checkpoint.every": "20 steps"}
EVALUATED = {"data.eval_split": "test", "eval.every": "20 steps"}
CLEAR = 0.1  # between the best answer and the second, in logits or votes; sums in another order change some 1e-5
# On a TPU slice too, rows of a process need not be neighbors, and `tensor` may join processes, which then feed the
# same rows.
MESHES = {  # processes, devices of all, fields
    "data": (4, 4, {}),
    "zero": (2, 8, {"mesh.zero": "on", "devices": [0, 4, 5, 1, 2, 6, 7, 3], **EVALUATED}),
    "fsdp": (2, 4, {"mesh.data": 1, "mesh.fsdp": 4, "devices": [0, 2, 3, 1]}),
    "tensor": (2, 4, {"mesh.data": 2, "mesh.tensor": 2, "devices": [0, 2, 3, 1]}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


def metrics(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def one(place) -> Path:
    """The run of a single process with eight devices."""
    finish(place / "one", place / "compiled", processes=1, fields=LARGE | EVALUATED)
    return place / "one"


@pytest.mark.parametrize("method", ["splitmask", "dino"])
def test_processes_share_vocabulary_negatives_and_center_as_the_devices_of_one_do(place, method):
    fields = {"method": method, "model.depth": 1, "checkpoint.every": "20 steps", "log.every": "1 steps"}
    for name, processes, devices in ((f"{method}_one", 1, 1), (f"{method}_two", 2, 4)):
        finish(place / name, place / "compiled", processes, devices, fields)
    one, two = (metrics(place / f"{method}_{name}", "train/loss") for name in ("one", "two"))
    assert len(set(one)) == peer.STEPS
    np.testing.assert_allclose(two, one, rtol=1e-5)
    states = [state_of(place / f"{method}_{name}") for name in ("one", "two")]
    name = {"splitmask": "extras/vocabulary", "dino": "extras/center"}[method]
    assert np.abs(states[0][name]).max() > 0
    np.testing.assert_allclose(states[1][name], states[0][name], atol=1e-5)


def test_a_detector_begins_on_two_processes_as_on_one(place):
    """Later, an anchor or region whose overlap lies at a threshold may be sampled by one and not by the other."""
    fields = {"method": "detection", "data.source": "digit_scenes", "data.path": "", "data.image_size": (48, 48),
              "data.augment": "none", "eval.crop_ratio": (1.0,), "checkpoint.every": "20 steps", "log.every": "1 steps"}
    for name, processes, devices in (("detector_one", 1, 1), ("detector_two", 2, 4)):
        finish(place / name, place / "compiled", processes, devices, fields)
    one, two = (json.loads((place / name / "metrics.jsonl").read_text().splitlines()[0])
                for name in ("detector_one", "detector_two"))
    losses = [name for name in one if name.startswith("train/") and "loss" in name]
    assert len(losses) >= 6
    np.testing.assert_allclose([two[name] for name in losses], [one[name] for name in losses], rtol=1e-5)
    assert two["train/positive_regions"] == one["train/positive_regions"]
    assert one["train/loss_boxes"] > 0  # some regions are positive: at first, the true boxes
    runs = [metrics(place / name, "train/loss") for name in ("detector_one", "detector_two")]
    assert len(set(runs[0])) == peer.STEPS
    apart = int((np.abs(np.array(runs[1]) / runs[0] - 1) > 1e-5).sum())
    print(f"steps whose samples flipped: {apart} of {peer.STEPS}")
    assert apart <= peer.STEPS // 4


def test_processes_end_early_at_the_same_step_and_stay_so(place):
    fields = {"data.source": "photo_crops", "data.path": "", "data.train_split": "train[:64]",
              "data.val_split": "train[3336:]", "data.eval_split": "test[:16]", "eval.max_examples": 16,
              "eval.every": "2 steps", "optim.lr": 0.0,
              "checkpoint.best_metric": "val/rankme", "train.patience": "4 steps"}  # nothing improves
    outputs = finish(place / "early", place / "compiled", processes=2, devices=2, fields=fields)
    assert f"finished 4 steps of {peer.STEPS}, early: val/rankme was best at step 0" in outputs[0]
    assert (place / "early" / "DONE").read_text() == "4\nval/rankme was best at step 0\n"
    assert json.loads((place / "early" / "best" / "score.json").read_text())["step"] == 0
    assert metrics(place / "early", "eval/rankme") == metrics(place / "early", "eval/best/rankme")
    outputs = finish(place / "early", place / "compiled", processes=2, devices=2, fields=fields)
    assert f"is finished: step 4 of {peer.STEPS}, early" in outputs[0]
    assert metrics(place / "early", "val/best_step") == [0.0]


@pytest.mark.parametrize("mesh", MESHES)
def test_processes_train_as_one_on_the_same_examples_and_one_device_reads_what_they_saved(one, place, mesh):
    processes, devices, fields = MESHES[mesh]
    outputs = finish(place / mesh, place / "compiled", processes, devices, LARGE | fields)
    losses = metrics(place / mesh, "train/loss")
    assert len(losses) == peer.STEPS
    np.testing.assert_allclose(losses, metrics(one, "train/loss"), rtol=1e-5)
    assert drawn(place / mesh) == drawn(one)
    assert int(state_of(place / mesh)["step"]) == peer.STEPS  # every array's checksum is verified
    assert "finished" in outputs[0]
    assert not any("finished" in text or "step" in text for text in outputs[1:])
    if mesh == "tensor":
        line = (place / "tensor.ids.0").read_text().splitlines()[1]
        assert len(line.split()) == 18  # the step, all 16 rows and the end


def test_every_held_out_example_is_counted_once_with_the_same_answer(one, place):
    zero = place / "zero"
    for folder in (one, zero):
        seen = [number for rows in drawn(folder, "evaluated", 2).values() for number in rows.values() if number >= 0]
        assert sorted(seen) == list(range(peer.SIZES["evaluate"]))
        for name in ("eval/knn/top1", "eval/linear/top1"):
            assert metrics(folder, name) == [pytest.approx(peer.TOP1, rel=1e-6)]
    np.testing.assert_allclose(metrics(zero, "eval/loss"), metrics(one, "eval/loss"), rtol=1e-5)
    assert sorted(path.name for path in (zero / "pictures").iterdir()) == [
        "attention_0000020.png", "curves_0000020.png", "inputs_0000000.png", "ratios_0000020.png",
        "reconstruct_0000020.png"]
    run, state = restored(one)
    with jax.set_mesh(run.program.mesh), margins.of_probes() as found:
        Evaluator(run.program.method, run.inputs, run.program.mesh).scalars(state)
    assert min(found) > CLEAR


def test_a_classifier_is_judged_alike_by_one_process_and_two(place):
    fields = {"method": "supervised", "model.width": 128, "model.heads": 4, "method.head_std": 1.0, "method.mixup": 0.8,
              "log.every": "1 steps", "checkpoint.every": "20 steps", **EVALUATED}
    finish(place / "judged_one", place / "compiled", processes=1, fields=fields)
    finish(place / "judged_two", place / "compiled", processes=2, devices=4, fields=fields | {"mesh.zero": "on"})
    one, two = ({name: metrics(place / folder, name) for name in ("train/loss", "eval/loss", "eval/top1")}
                for folder in ("judged_one", "judged_two"))
    for name in ("train/loss", "eval/loss"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5)
        assert len(one[name]) > 0
    assert two["eval/top1"] == one["eval/top1"] == [pytest.approx(peer.TOP1, rel=1e-6)]
    run, state = restored(place / "judged_one")
    for params in (state.ema, state.params):
        assert margins.of_classifier(run.program.method, params, state.extras, run.inputs.evaluate()) > CLEAR
    seen = [number for rows in drawn(place / "judged_two", "evaluated", 2).values() for number in rows.values()]
    assert sorted(number for number in seen if number >= 0) == list(range(peer.SIZES["evaluate"]))


@pytest.fixture(scope="module")
def golden(place) -> Path:
    finish(place / "golden", place / "compiled", devices=2)
    return place / "golden"


def begun(folder: Path, cache: Path) -> list[subprocess.Popen]:
    """Starts two processes and returns when they have saved once."""
    run = start(folder, cache, devices=2)
    assert wait_for(folder / "checkpoints" / "4", run)
    return run


@pytest.mark.parametrize(("fault", "victim"), [("sigterm", 1), ("kill", 0), ("freeze", 1)])
def test_what_happens_to_one_ends_all_in_time_and_the_next_start_goes_on_bit_for_bit(golden, place, fault, victim):
    folder = place / f"{fault}_{victim}"
    found = strike(begun(folder, place / "compiled"), victim, fault, 0.2)
    assert found["struck"]
    if fault == "sigterm":
        assert found["codes"] == [75, 75]
        assert "stopped at step" in output(folder, 0)
    else:
        assert set(found["codes"]) <= {134, -signal.SIGABRT}  # the second one: JAX was faster
    if fault == "freeze":
        assert f"process {victim} of 2 was lost: it sent nothing for 5 s" in output(folder, 1 - victim)
    finish(folder, place / "compiled", devices=2)
    assert same(folder, golden)


def test_a_mistake_on_one_process_ends_all_with_its_line(place):
    folder = place / "mistaken"
    run = start(folder, place / "compiled", devices=2, fields={"only": {"1": {"data.path": str(place / "nowhere")}}})
    assert ends(run, 60) == [2, 2]
    line = f"error: data.path='{place}/nowhere' has no meta.json of cached batches"
    assert output(folder, 1).startswith(line)
    assert f"process 1 stopped: {line}" in output(folder, 0)


def main(place: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mae_jax.main", "--config=configs/quickstart.py:runlocal",
                           f"--workdir={place}/main", *flags], env=environment(2, place / "compiled"),
                          capture_output=True, text=True, timeout=120)


def test_the_command_names_who_is_absent_and_leaves_nothing(tmp_path):
    done = main(tmp_path, f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--process=0", "--start_seconds=1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: process 1 of 2 did not connect to 127.0.0.1:")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "main").exists()


def test_a_dry_run_says_how_the_run_would_be_laid_out_and_leaves_nothing(tmp_path):
    done = main(tmp_path, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "2 devices (cpu) of 1 process" in done.stdout
    assert "mesh: data 2, zero 1, fsdp 1, tensor 1" in done.stdout
    assert "process 0: 16 rows of 16, 2 devices" in done.stdout
    assert "compiled after" in done.stdout
    assert not (tmp_path / "main").exists()
