"""From what a compiler said to the figures of the page; the cache of compiled steps."""

from types import SimpleNamespace

import jax
import pytest

from mae_jax.commands.plan import cost, page, tpu
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
    assert "step            1.0000 s = compiler 0.7500 + communication 0.2500" in text
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
    assert "17.000 of 16" in page.page(CONFIG, f)
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


@pytest.mark.slow
def test_what_was_compiled_is_found_again_and_another_config_is_not(tmp_path):
    target, said = cost.Target("1 simulated devices", jax.devices("cpu"), None), []
    first = cost.measure(tiny_config(), target, 64, str(tmp_path), said.append)
    again = cost.measure(tiny_config(), target, 64, str(tmp_path), said.append)
    assert (first["cached"], again["cached"], len(said)) == (False, True, 1)
    assert {key: again[key] for key in first if key != "cached"} == {
        key: value for key, value in first.items() if key != "cached"}
    assert first["optimal_seconds"] is None
    assert first["total_bytes"] > first["parameter_bytes"] + first["optimizer_bytes"]
    assert not cost.measure(tiny_config({"batch_size": 4}), target, 64, str(tmp_path))["cached"]
    f = cost.figures(tiny_config(), target, again, examples=64)
    assert (f["fits"], f["estimated_step_seconds"], f["hbm_limit_gib"]) == (None, None, None)
    text = page.page(tiny_config(), f)
    assert "no time: the devices are simulated" in text
    assert "compiled before" in text
