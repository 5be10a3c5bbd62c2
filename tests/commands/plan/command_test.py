"""The command, and what libtpu makes of the train step for TPUs that are not there."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest

PLAN = [sys.executable, "-m", "mae_jax", "plan"]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu, the extra 'plan', is not installed: there is no TPU compiler to ask")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*PLAN, *arguments], capture_output=True, text=True, timeout=300)


def test_help_exits_0_and_shows_a_command_that_works():
    done = run("--help")
    assert done.returncode == 0
    assert "mae_jax plan --config=vit_l_mae --topology=v3:8x8" in done.stdout
    assert "--sweep" in done.stdout.split("Flags:")[1]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "line"), [
    ([], "give one of --topology=v3:8x8 and --devices=8"),
    (["--topology=v3:8x8", "--devices=8"], "give one of"),
    (["--topology=v9:8x8"], "unknown topology 'v9:8x8'; known: 7x, a100-40, a100-80, h100, h200, l4, v2, v3, v4, "),
    (["--topology=h20:8"], "unknown topology 'h20:8'; did you mean 'h200'? "),
    (["--devices=8", "--sweep=batch_sise=8"], "--sweep: unknown config field 'batch_sise'; did you mean 'batch_size'?"),
    (["--topology=h200:9"], "topology 'h200:9': write the number of GPUs of one host, 1 to 8, as h200:8"),
    (["--devices=3"], "batch_size=16 in 1 micro-batches does not divide over 3 devices; nearest: 15 and 18"),
])
def test_a_mistake_ends_with_one_line_and_2(arguments, line):
    done = run("--config=configs/quickstart.py:runlocal", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.slow
def test_simulated_devices_are_planned_without_a_time_and_the_json_says_the_same(tmp_path):
    file = tmp_path / "plan.json"
    done = run("--config=configs/quickstart.py:runlocal", "--devices=8", f"--json={file}", f"--cache={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "no time: the devices are simulated" in done.stdout
    assert "mesh data 8, zero 1, fsdp 1, tensor 1" in done.stdout
    written = json.loads(file.read_text())
    assert written["hbm_gib_per_core"] > 0
    assert {(row["kind"], row["group_size"]) for row in written["collectives"]} == {("all-reduce", 8)}
    for key in ("compiler_seconds", "communication_seconds", "estimated_step_seconds", "images_per_sec", "fits"):
        assert written[key] is None


@pytest.fixture(scope="module")
def two_layers() -> dict:
    """Returns what libtpu says of two layers of ViT-L, by a process of its own: libtpu stays loaded in it."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # libtpu ends at flags that are for CPUs
    done = subprocess.run([sys.executable, "-W", "error", "-m", "tests.multidevice.compile_tpu"], capture_output=True,
                          text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def whole_bytes(figures: dict) -> dict[str, float]:
    """Returns kind → bytes of the arrays that it reduces or gathers, counted once however many stages it takes."""
    devices, whole = figures["devices"], defaultdict(float)
    for row in figures["collectives"]:
        turns = 2 if row["kind"] == "all-reduce" else 1
        share = 1 if row["kind"] == "collective-permute" else (devices - 1) / devices
        whole[row["kind"]] += row["bytes_sent"] / share / turns
    return whole


@pytest.mark.compile
@pytest.mark.timeout(900)
@needs_libtpu
def test_two_layers_of_vit_l_fit_four_v3_chips(two_layers):
    for found in two_layers.values():
        figures = found["figures"]
        assert figures["fits"]
        assert figures["devices"] == 8
        assert figures["parameters_gib"] + figures["optimizer_gib"] < figures["hbm_gib_per_core"] < 16
        assert figures["flops_per_core"] == pytest.approx(figures["model_flops_per_core"], rel=0.05)
    off, on = (two_layers[zero]["figures"]["optimizer_gib"] for zero in ("off", "on"))
    assert on == pytest.approx(off / 8, rel=0.05)


@pytest.mark.compile
@pytest.mark.timeout(900)
@needs_libtpu
def test_without_zero_gradients_and_metrics_are_reduced_in_float32_and_nothing_else_is_sent(two_layers):
    found = two_layers["off"]
    whole = whole_bytes(found["figures"])
    assert set(whole) == {"all-reduce"}
    assert whole["all-reduce"] == pytest.approx(4 * found["values"], rel=0.05)
    assert {row["dtype"] for row in found["figures"]["collectives"] if row["bytes"] > 1000} == {"f32"}


@pytest.mark.compile
@pytest.mark.timeout(900)
@needs_libtpu
def test_with_zero_each_gradient_is_scattered_and_each_parameter_gathered_once(two_layers):
    found = two_layers["on"]
    rows, whole = found["figures"]["collectives"], whole_bytes(found["figures"])
    assert set(whole) <= {"reduce-scatter", "all-gather", "all-reduce", "collective-permute"}
    assert whole["reduce-scatter"] + whole["all-reduce"] == pytest.approx(4 * found["values"], rel=0.05)
    assert whole["reduce-scatter"] == pytest.approx(4 * found["cut_values"], rel=0.05)
    assert whole["all-gather"] == pytest.approx(2 * found["cut_values"], rel=0.05)
    gathers = [row for row in rows if row["kind"] == "all-gather"]
    assert [(row["dtype"], row["count"]) for row in gathers] == [("bf16", found["cut"])] * len(gathers)
    assert whole["collective-permute"] < 0.01 * sum(whole.values())
