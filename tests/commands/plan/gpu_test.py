"""Names and descriptions of GPUs, the products in a compiled text, and what XLA makes of a step for cards not here."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mae_jax.commands.plan import cost, gpu, gpu_cost, gpu_text
from mae_jax.errors import UserError
from mae_jax.training import throughput

PLUGIN = any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin")))
TEXT = """HloModule jit_step, is_scheduled=true

%body (arg: (s32[], bf16[4,6,8], bf16[4,8,10])) -> (s32[], bf16[4,6,8], bf16[4,8,10]) {
  %arg = (s32[], bf16[4,6,8]{2,1,0}, bf16[4,8,10]{2,1,0}) parameter(0)
  %x = bf16[4,6,8]{2,1,0} get-tuple-element(%arg), index=1
  %y = bf16[4,8,10]{2,1,0} get-tuple-element(%arg), index=2
  %gemm.2 = (bf16[4,6,10]{2,1,0}, s8[64]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %tuple.1 = (s32[], bf16[4,6,8]{2,1,0}, bf16[4,8,10]{2,1,0}) tuple(%i, %x, %y)
}

ENTRY %main (q: bf16[2,16,3,8], s: (s32[], bf16[4,6,8], bf16[4,8,10])) -> bf16[2,3,16,8] {
  %q = bf16[2,16,3,8]{3,2,1,0} parameter(0)
  %s = (s32[], bf16[4,6,8]{2,1,0}, bf16[4,8,10]{2,1,0}) parameter(1)
  %while.1 = (s32[], bf16[4,6,8]{2,1,0}, bf16[4,8,10]{2,1,0}) while(%s), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %fwd = (bf16[2,3,16,8]{3,1,2,0}, f32[2,3,16]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": \
{"element_type": "BF16", "dimensions": ["2", "3", "16", "16"]}}}
  %bwd = (bf16[2,3,16,8]{3,1,2,0}, bf16[2,3,16,8]{3,1,2,0}, bf16[2,3,16,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, \
%q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": \
{"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "3", "16", "16"]}}}
  ROOT %out = bf16[2,3,16,8]{3,1,2,0} get-tuple-element(%fwd), index=0
}
"""


@pytest.mark.parametrize(("name", "card", "count"), [
    ("h200:8", "h200", 8), ("h200", "h200", 1), ("a100-40:2", "a100-40", 2), ("l4:1", "l4", 1)])
def test_a_name_is_a_card_and_how_many(name, card, count):
    assert gpu.parse(name) == (gpu.CARDS[card], count)


def test_what_names_no_card_is_for_others_to_read():
    assert gpu.parse("v3:8x8") is gpu.parse("") is gpu.parse("h20:8") is None


@pytest.mark.parametrize("name", ["h200:9", "h200:0", "h200:", "h200:2x2", "a100-80:16"])
def test_more_than_a_host_holds_is_refused(name):
    with pytest.raises(UserError, match=r"number of GPUs of one host, 1 to 8, as \w+(-80)?:8$"):
        gpu.parse(name)


@pytest.mark.parametrize(("name", "line"), [
    ("h20:8", "unknown topology 'h20:8'; did you mean 'h200'? known: 7x, a100-40, "),
    ("h200-8", "unknown topology 'h200-8'; did you mean 'h200'?"),
    ("h100x8", "unknown topology 'h100x8'; did you mean 'h100'?"),
    ("v33:8x8", "unknown topology 'v33:8x8'; did you mean 'v3'? known: 7x, a100-40, ")])
def test_a_name_of_neither_kind_is_answered_with_the_nearest(name, line):
    with pytest.raises(UserError) as error:
        cost.target(name, 0)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_without_the_plugin_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mae_jax\[plan-gpu\]'"):
        gpu.devices("h200:8")


def test_every_card_has_a_peak_and_no_measured_rate_above_its_datasheet():
    peaks = {"a100-40": 312e12, "a100-80": 312e12, "h100": 989e12, "h200": 989e12, "l4": 121e12}
    assert peaks.keys() == gpu.CARDS.keys()
    for name, card in gpu.CARDS.items():
        assert throughput.peak_flops(SimpleNamespace(device_kind=card.name)) == peaks[name]
        copied, products, _ = gpu.rates(card, peaks[name])
        assert 0.5 < copied / card.hbm_rate < 1
        assert 0.5 < products / peaks[name] < 1


def test_products_count_two_flops_for_each_term_and_those_of_attention_too():
    kernels = gpu_text.kernels(TEXT)
    scores = 2 * 3 * 16 * 16
    assert gpu_cost.product_flops(TEXT, kernels) == 5 * 2 * (4 * 6 * 10) * 8 + (2 + 5) * 2 * scores * 8


def test_the_workspace_of_libraries_is_told_from_what_is_moved():
    assert gpu_cost.workspace(gpu_text.kernels(TEXT)) == 5 * 64  # the product in the loop; attention has none


def test_a_loop_that_does_not_say_how_often_it_runs_is_noticed():
    assert not gpu_cost.unknown_loops(TEXT)
    assert gpu_cost.unknown_loops(TEXT.replace("known_trip_count", "other"))


@pytest.fixture(scope="module")
def compiled() -> dict:
    """Returns what XLA says of two layers of ViT-B for one and for eight H200, by a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "CUDA_VISIBLE_DEVICES": "-1"}
    warnings = ["-W", "error", "-W", "ignore:The Pallas Triton backend is deprecated"]  # by JAX 0.12
    done = subprocess.run([sys.executable, *warnings, "-m", "tests.multidevice.compile_gpu"], capture_output=True,
                          text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.compile
@pytest.mark.timeout(900)
@pytest.mark.skipif(not PLUGIN, reason="JAX's CUDA plugin, the extra 'plan-gpu', is not installed")
def test_two_layers_of_vit_b_for_gpus_that_are_not_there(compiled):
    one, eight = compiled["h200:1"], compiled["h200:8"]
    assert one["device_kind"] == "NVIDIA H200"
    for figures in (one, eight):
        assert figures["fits"]
        assert figures["flops_per_core"] == pytest.approx(figures["model_flops_per_core"], rel=0.05)
        assert figures["parameters_gib"] + figures["optimizer_gib"] < figures["hbm_gib_per_core"]
        assert figures["estimated_step_seconds"] > figures["product_seconds"] > 0
    assert one["collectives"] == []
    assert eight["optimizer_gib"] == pytest.approx(one["optimizer_gib"] / 8, rel=0.05)  # ZeRO
    sent = {row["kind"]: row["bytes"] for row in eight["collectives"] if row["bytes"] > 1e6}
    assert set(sent) == {"reduce-scatter", "all-gather"}
    assert sent["reduce-scatter"] == pytest.approx(4 * one["parameters"], rel=0.05)
    assert sent["all-gather"] == pytest.approx(2 * one["parameters"], rel=0.05)


@pytest.mark.compile
@pytest.mark.timeout(900)
@pytest.mark.skipif(not PLUGIN, reason="JAX's CUDA plugin, the extra 'plan-gpu', is not installed")
def test_layers_in_a_loop_count_as_often_as_they_run(compiled):
    rolled, unrolled = compiled["scan"], compiled["h200:1"]
    assert rolled["flops_per_core"] == pytest.approx(unrolled["flops_per_core"], rel=0.01)
    assert rolled["estimated_step_seconds"] == pytest.approx(unrolled["estimated_step_seconds"], rel=0.5)
