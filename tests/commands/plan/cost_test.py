"""From what a compiler said to the figures of the page; the cache of compiled steps."""

import contextlib
from types import SimpleNamespace

import jax
import pytest

from mae_jax.commands.plan import cost, gpu, page, tpu
from tests.helpers.tiny import tiny_config, tiny_program

V3 = cost.Target("v3:2x2", [SimpleNamespace(coords=[x, y, 0], device_kind="TPU v3") for x in (0, 1) for y in (0, 1)
                                for _ in (0, 1)], tpu.CHIPS["v3"])
ROW = {"kind": "all-reduce", "dtype": "f32", "group_size": 8, "count": 3, "bytes": 10**6, "bytes_sent": 1.75e6,
       "seconds": 0.25}
SHAPES = {
    "mesh": {"data": 8, "zero": 1, "fsdp": 1, "tensor": 1}, "hosts": 1, "rows_per_host": 8, "parameters": 10**6,
    "parameter_bytes": 2**30, "optimizer_bytes": 2**31, "extras_bytes": 0, "batch_bytes": 2**20, "image_bytes": 1000,
    "model_flops_per_image": 10**12, "peak_flops": 4e12, "compile_seconds": 30.0, "cached": False,
}
FOUND = SHAPES | {
    "short": None, "argument_bytes": 3 * 2**30, "temporary_bytes": 2**30, "total_bytes": 4 * 2**30, "flops": 1.1e12,
    "bytes_accessed": 5e9, "optimal_seconds": 0.75, "unpriced": [], "collectives": [ROW],
}
CONFIG = tiny_config({"train.duration": "3600 steps"})


def test_the_estimate_is_the_compilers_seconds_and_the_communications():
    f = cost.figures(CONFIG, V3, FOUND, examples=1000)
    assert (f["compiler_seconds"], f["communication_seconds"], f["estimated_step_seconds"]) == (0.75, 0.25, 1.0)
    assert f["images_per_sec"] == f["images_per_sec_per_host"] == 8
    assert f["input_bytes_per_sec_per_host"] == 8000
    assert f["mfu"] == 0.25  # 1e12 FLOPs per device and second of 4e12
    assert (f["hours"], f["core_hours"]) == (1, 8)
    assert (f["hbm_gib_per_core"], f["hbm_limit_gib"], f["fits"]) == (4, 16, True)
    assert (f["devices"], f["chips"], f["hosts"]) == (8, 4, 1)
    text = page.page(CONFIG, f)
    assert text.startswith("fits; 1.0 hours; the input must make 8 images/s per host\n")  # 16 px: no rate was measured
    assert "step            1 s = compiler 0.75 + communication 0.25" in text
    assert "nothing overlapped" in text
    assert "fits: yes" in text


@pytest.mark.parametrize(("change", "words"), [
    ({"unpriced": ["custom call tpu_custom_call", "while"]}, ["tpu_custom_call, while", "model.scan"]),
    ({"unpriced": ["collectives"], "collectives": None}, ["collectives"]),
    ({"optimal_seconds": -1.0}, ["the compiler gives none"]),
    ({"unpriced": ["custom call AssumeGatherIndicesInBound"]}, ["AssumeGatherIndicesInBound"]),
])
def test_no_time_is_quoted_for_what_the_compiler_does_not_price(change, words):
    f = cost.figures(CONFIG, V3, FOUND | change, examples=1000)
    for key in ("compiler_seconds", "communication_seconds", "estimated_step_seconds", "images_per_sec", "mfu", "hours",
                "core_hours"):
        assert f[key] is None
    assert f["fits"]
    assert f["hbm_gib_per_core"] == 4
    last = page.page(CONFIG, f).split("no time: ")[1]
    for word in words:
        assert word in last


def test_a_step_that_needs_more_than_the_chip_has_does_not_fit():
    f = cost.figures(CONFIG, V3, FOUND | {"total_bytes": 17 * 2**30}, examples=1000)
    assert not f["fits"]
    text = page.page(CONFIG, f)
    assert text.startswith("does not fit: needs 17 GiB of a device that has 16; a smaller batch_size")
    assert "17 GiB of 16 GiB" in text
    error = ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
             "HLO temporaries (22.35G) exceeds available HBM (15.48G). HLO module: jit_train_step.\nSee https://")
    short = cost._shortage(error)
    assert short == {"needed": 22.35 * 2**30, "available": 15.48 * 2**30}
    f = cost.figures(CONFIG, V3, SHAPES | {"short": short}, examples=1000)
    assert not f["fits"]
    assert f["hbm_gib_per_core"] == 22.35
    assert f["estimated_step_seconds"] is None
    text = page.page(CONFIG, f)
    assert "fits: no (the compiler needs 22.35 GiB and has 15.48)" in text
    assert "collectives: not known" in text


def test_a_device_holds_its_piece_of_what_is_cut_and_all_of_the_rest():
    config = tiny_config()
    program = tiny_program(config)
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(program.state.params))
    assert cost.held(program.state.params) == whole
    found = cost._shapes(program)
    assert found["optimizer_bytes"] == 2 * whole + 4  # two moments, and the count of steps
    assert found["rows_per_host"] == config.batch_size
    # patches uint8 [16, 48], order int32 [16], label, id and replaced int32, valid float32
    assert found["image_bytes"] == 16 * 48 + 16 * 4 + 4 * 4


H200 = cost.Target("h200:2", [SimpleNamespace(device_kind="NVIDIA H200")] * 2, gpu.CARDS["h200"])
KERNELS = [{"kind": "__cublas$lt$matmul", "count": 400, "bytes": 3 * 10**9},
           {"kind": "all-reduce-start", "count": 1, "bytes": 10**6}]
ON_GPU = FOUND | {"bytes_accessed": 4.3e9, "workspace_bytes": 1500, "flops": 7.9e12, "kernels": KERNELS,
                  "peak_flops": 989e12, "collectives": [ROW | {"seconds": 0.5e-3}]}
DEEP = tiny_config({"train.duration": "3600 steps", "data.image_size": (224, 224)})


def test_a_gpus_estimate_is_a_roofline_at_the_rates_that_were_measured_on_it():
    f = cost.figures(DEEP, H200, ON_GPU, examples=1000)
    parts = (f["memory_seconds"], f["product_seconds"], f["communication_seconds"])
    assert parts == pytest.approx((1e-3, 10e-3, 0.5e-3))
    assert f["estimated_step_seconds"] == pytest.approx(11.5e-3)
    assert f["mfu"] == pytest.approx(8 * 1e12 / 2 / 11.5e-3 / 989e12)
    assert (f["assumed"], f["compiler_seconds"], f["chips"]) == ([], None, 2)
    assert f["input_cores_per_host"] == pytest.approx(8 / 11.5e-3 / 517)
    text = page.page(DEEP, f, price=100.0)
    assert text.startswith("fits; 41.4 seconds, 2.30 at 100 per device-hour; the input must make 696 images/s per "
                           "host, about 2 of its cores\n")
    assert "step            0.0115 s = memory 0.001 + products 0.01 + communication 0.0005" in text
    assert "of 401 kernels, about 1.2 ms" in text
    assert "and workspace lent to libraries, 1.5 kB, which takes no time here" in text
    assert "__cublas$lt$matmul                      400       3 GB" in text
    assert "not measured" not in text


def test_what_was_not_measured_on_a_gpu_is_told():
    target = H200._replace(chip=gpu.CARDS["h100"])
    f = cost.figures(DEEP, target, ON_GPU, examples=1000)
    assert f["assumed"] == ["memory"]
    assert f["memory_seconds"] == pytest.approx(4.3e9 / (3352e9 * 4.3 / 4.8))
    assert f["product_seconds"] == pytest.approx(7.9 / 798)
    assert "not measured on this card: memory; the share of its datasheet" in page.page(DEEP, f)
    f = cost.figures(DEEP, H200._replace(chip=gpu.CARDS["l4"]), ON_GPU | {"peak_flops": 121e12}, examples=1000)
    assert f["assumed"] == ["memory", "products"]
    assert f["product_seconds"] == pytest.approx(7.9 / (121 * 790 / 989))


def test_loops_of_unknown_length_leave_a_gpu_without_a_time():
    f = cost.figures(DEEP, H200, ON_GPU | {"unpriced": ["loops of unknown length"]}, examples=1000)
    assert f["estimated_step_seconds"] is None
    assert page.verdict(f) == "fits; no time: the compiler does not price all of: loops of unknown length"
    assert f["roofline"]["product_seconds"] == pytest.approx(10e-3)
    assert "no time of a step: products 10 ms at 790 TFLOP/s, memory 1 ms at 4.3 TB/s" in page.page(DEEP, f)


def test_a_tpus_step_with_loops_has_the_sides_of_its_roofline_and_no_time():
    f = cost.figures(CONFIG, V3, FOUND | {"unpriced": ["while"], "flops": 4e11}, examples=1000)
    assert f["roofline"]["product_seconds"] == pytest.approx(0.25)  # of the model: the compiler counts loops once
    assert f["roofline"]["memory_seconds"] == pytest.approx(5e9 / 450e9)
    assert "products 250 ms at 4 TFLOP/s, memory 11.1 ms at 0.45 TB/s" in page.page(CONFIG, f)
    assert cost.figures(CONFIG, V3, FOUND, examples=1000)["roofline"] is None
    assert f["images_per_sec"] is None


@pytest.mark.parametrize(("part", "fits", "words"), [
    (0.75, True, "fits; 41.4 seconds"),
    (0.76, True, "fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment;"),
    (0.96, False, "does not fit: needs 134 GiB of a device that has 140;")])
def test_a_gpus_memory_is_not_all_taken_by_jax_unless_it_is_told(part, fits, words):
    f = cost.figures(DEEP, H200, ON_GPU | {"total_bytes": int(part * gpu.CARDS["h200"].hbm)}, examples=1000)
    assert f["fits"] is fits
    assert page.page(DEEP, f).startswith(words)


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (1234567.8, "1,234,568"), (999.6, "1,000"), (123.4, "123"), (12.34, "12.3"), (7.75, "7.75"), (2.0, "2"),
    (100.0, "100"), (0.001234, "0.00123"), (4.2e-8, "0.000000042"), (-0.05, "-0.05")])
def test_no_figure_is_rounded_to_0(value, text):
    assert page.digits(value) == text


def test_sizes_times_and_money_come_in_a_unit_that_shows_them():
    assert [page.size(n) for n in (4, 1500, 2.5e12)] == ["4 B", "1.5 kB", "2.5 TB"]
    assert page.size(3 * 2**19, 1024) == "1.5 MiB"
    assert [page.seconds(x) for x in (0.0, 2.5, 3e-3, 4.5e-6, 3e-11)] == ["0 s", "2.5 s", "3 ms", "4.5 us", "0.03 ns"]
    assert [page.duration(x) for x in (7.75, 0.5, 1e-4)] == ["7.8 hours", "30.0 minutes", "0.36 seconds"]
    assert [page.money(x) for x in (1234.5, 0.00172)] == ["1,234.50", "0.00172"]


@pytest.mark.slow
def test_what_was_compiled_is_found_again_and_another_config_is_not(tmp_path):
    target, said = cost.Target("1 simulated devices", jax.devices("cpu"), None), []

    @contextlib.contextmanager
    def progress(text):
        said.append(text)
        yield

    first = cost.measure(tiny_config(), target, 64, str(tmp_path), progress)
    again = cost.measure(tiny_config(), target, 64, str(tmp_path), progress)
    assert (first["cached"], again["cached"], len(said)) == (False, True, 1)
    assert {key: again[key] for key in first if key != "cached"} == {
        key: value for key, value in first.items() if key != "cached"}
    assert first["optimal_seconds"] is None
    assert first["total_bytes"] > first["parameter_bytes"] + first["optimizer_bytes"]
    assert not cost.measure(tiny_config({"batch_size": 4}), target, 64, str(tmp_path))["cached"]
    f = cost.figures(tiny_config(), target, again, examples=64)
    assert (f["fits"], f["estimated_step_seconds"], f["hbm_limit_gib"]) == (None, None, None)
    text = page.page(tiny_config(), f)
    assert text.startswith("simulated devices: neither a time, nor whether it fits\n")
    assert "no time: the devices are simulated" in text
    assert "compiled before" in text
