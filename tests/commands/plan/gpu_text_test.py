"""Kernels and bytes, on lines that XLA wrote for a GPU, against sums done by hand."""

import pytest

from mae_jax.commands.plan import gpu_text

TEXT = """HloModule jit_step, is_scheduled=true

%fused_add (param_0: bf16[4,8]) -> bf16[4,8] {
  %param_0 = bf16[4,8]{1,0} parameter(0)
  ROOT %add.1 = bf16[4,8]{1,0} add(%param_0, %param_0)
}

%body (arg: (s32[], f32[16])) -> (s32[], f32[16]) {
  %arg = (s32[], f32[16]{0}) parameter(0)
  %gte.1 = f32[16]{0} get-tuple-element(%arg), index=1
  %copy.1 = f32[16]{0} copy(%gte.1)
  ROOT %tuple.1 = (s32[], f32[16]{0}) tuple(%gte.0, %copy.1)
}

%condition (arg.1: (s32[], f32[16])) -> pred[] {
  %arg.1 = (s32[], f32[16]{0}) parameter(0)
  ROOT %compare.1 = pred[] compare(%a, %b), direction=LT
}

%command_buffer (p: bf16[4,8], q: bf16[8,2]) -> (bf16[4,2], s8[1024]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %q = bf16[8,2]{1,0} parameter(1)
  %loop_add_fusion = bf16[4,8]{1,0} fusion(%p), kind=kLoop, calls=%fused_add, metadata={op_name="jit(step)/add"}
  ROOT %gemm.1 = (bf16[4,2]{1,0}, s8[1024]{0}) custom-call(%loop_add_fusion, %q), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{}}
}

ENTRY %main (x: bf16[4,8], w: bf16[8,2], s: (s32[], f32[16])) -> bf16[4,2] {
  %x = bf16[4,8]{1,0} parameter(0)
  %w = bf16[8,2]{1,0} parameter(1)
  %s = (s32[], f32[16]{0}) parameter(2)
  %while.1 = (s32[], f32[16]{0}) while(%s), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %call.1 = (bf16[4,2]{1,0}, s8[1024]{0}) call(%x, %w), to_apply=%command_buffer
  ROOT %gte.2 = bf16[4,2]{1,0} get-tuple-element(%call.1), index=0
}
"""


def test_each_kernel_counts_what_it_reads_and_writes_and_a_loop_its_trips():
    found = [(kernel.kind, kernel.bytes, kernel.runs, kernel.source) for kernel in gpu_text.kernels(TEXT)]
    add, product = 2 * 4 * 8 * 2, 4 * 8 * 2 + 8 * 2 * 2 + 4 * 2 * 2 + 1024
    assert found == [("copy", 2 * 16 * 4, 5, ""), ("fusion:kLoop", add, 1, "jit(step)/add"),
                     ("__cublas$lt$matmul", product, 1, "")]


def test_sums_are_over_all_launches():
    found = gpu_text.kernels(TEXT)
    assert gpu_text.count(found) == 7
    assert gpu_text.moved(found) == 5 * 128 + 128 + 1136
    assert gpu_text.by_kind(found) == {"__cublas$lt$matmul": (1, 1136), "copy": (5, 640), "fusion:kLoop": (1, 128)}


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        gpu_text.kernels("HloModule empty")
