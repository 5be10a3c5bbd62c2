"""The same program on 1, 8 and 128 simulated devices; each in a process of its own."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.devices import simulated

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(module: str, devices: int, *arguments: str) -> dict:
    """Runs tests/multidevice/<module>.py on simulated devices; returns what its last line says."""
    command = [sys.executable, "-W", "error", "-m", f"tests.multidevice.{module}", *arguments]
    done = subprocess.run(command, env=simulated(devices), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("dtype", "tolerance", "meshes"), [
    ("float32", 1e-5, ()), ("bfloat16", 1e-3, ("data", "zero x fsdp", "slices", "tensor"))])
def test_every_mesh_trains_as_one_device_does_and_bit_for_bit_as_it_did_before(dtype, tolerance, meshes):
    found = run("losses", 8, dtype, *meshes)
    assert found["devices"] == 8
    assert len(set(found["one"])) == 20
    for name in found["held"]:
        np.testing.assert_allclose(found[name], found["one"], rtol=tolerance, err_msg=name)
    assert found["identical"]
    assert found["held"]["data"] == 1
    cut = {"zero", "fsdp", "zero x fsdp"} & found["held"].keys()
    assert max(found["held"][name] for name in cut) < 0.25
    # Half as many devices share the state where each of two slices has it all.
    assert found["held"]["zero x fsdp"] < found["held"]["slices"] < 0.4


def test_what_gpus_compute_is_the_same_on_meshes():
    assert max(run("like_gpus", 8).values()) < 1e-3


def test_terms_across_pictures_are_those_of_the_global_batch_and_so_are_their_gradients():
    """InfoNCE, DINO's loss and center: one device with 16 images beside four with 4 each and eight with 2."""
    for method, found in run("joint", 8).items():
        for name, (losses, extras, grads) in found.items():
            assert losses < 1e-5, (method, name)
            assert extras < (5e-6 if "segment" in method else 1e-6), (method, name)  # variances above 1
            assert grads < 1e-5, (method, name)


def test_a_detector_samples_and_learns_alike_on_every_mesh():
    found = run("detected", 8)
    assert min(found.pop("positives").values()) > 1  # so that there is something to differ in
    assert found.pop("repeated") == {"differ": 0, "distinct": 10}
    for name, apart in found.items():
        assert apart["metrics"] < 1e-5, name
        assert apart["gradients"] < 1e-4, name
        assert apart["samples"] == 0, name


def test_a_detector_is_judged_alike_on_every_mesh():
    found = run("judged", 8)
    assert found["1"] == found["2"] == found["8"]
    assert found["1"]["eval/box_ap"] == pytest.approx(0.4)
    assert found["1"]["results"] == 10


def test_supervised_meshes_train_alike_and_count_every_example_once():
    for arm, found in run("labelled", 8).items():
        figures, one = found.pop("figures"), found.pop("one")
        assert len(set(one)) == len(one)
        assert found.pop("clear") > 1e-3  # in logits, of which sums in another order change some 1e-6
        for name, losses in found.items():
            np.testing.assert_allclose(losses, one, rtol=1e-5, err_msg=f"{arm} {name}")
            assert figures[name]["confusion"] == figures["one"]["confusion"]
            assert figures[name]["eval/top1"] == figures["one"]["eval/top1"]
            assert figures[name]["eval/loss"] == pytest.approx(figures["one"]["eval/loss"], rel=1e-5)
        assert np.sum(figures["one"]["confusion"]) == 27
        assert len(np.unique(np.nonzero(figures["one"]["confusion"])[1])) > 1  # answers differ
