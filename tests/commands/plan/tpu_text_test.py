"""Cycles by kind of operation, on lines that libtpu wrote, against sums done by hand."""

from mae_jax.commands.plan import tpu_text
from mae_jax.commands.plan.tpu_text import Kind

TEXT = """
%fused_computation.4 (param_0.1: f32[64,197]) -> bf16[64,197] {
  ROOT %convert.1 = bf16[64,197]{1,0} convert(%param_0.1)
}
ENTRY %main.1 {
  %copy.70 = f32[64,197,16,1]{1,2,3,0:T(8,128)S(1)} copy(%l_16_.1), \
backend_config={"window_config":{"estimated_cycles":"4076"}}
  %fusion.1 = (f32[64,16,197]{2,1,0}, bf16[64,16,197,197]{3,2,1,0:T(8,128)(2,1)}) fusion(%a, %b), calls=%f.1, \
metadata={op_name="jit(step)/jvp(Block)/attn/bqhd,bkhd->bhqk/dot_general" stack_frame_id=14}, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
  %fusion.2 = bf16[64,16,197,197]{3,2,1,0} fusion(%a, %b), calls=%f.1, \
metadata={op_name="jit(step)/transpose(jvp(Block))/attn/bqhd,bkhd->bhqk/dot_general"}, \
backend_config={"window_config":{"estimated_cycles":"70"}}
  %fusion.3 = bf16[64,16,197,197]{3,2,1,0} fusion(%a, %b), kind=kOutput, calls=%f.2, \
metadata={op_name="jit(step)/transpose(jvp(Block))/attn/bqhd,bkhd->bhqk/dot_general"}, \
backend_config={"window_config":{"estimated_cycles":"30"}}
  %fusion.4 = f32[512]{0} fusion(%c), kind=kLoop, calls=%f.3, \
metadata={op_name="jit(step)/transpose(jvp(Block))/attn/proj/reduce_sum"}, \
backend_config={"window_config":{"estimated_cycles":"5"}}
  %copy.71 = bf16[64,197,512]{1,2,0} copy(%c), \
metadata={op_name="jit(step)/jvp(Block)/mlp/fc1/add"}, \
backend_config={"window_config":{"estimated_cycles":"2000"}}
  %call.1 = bf16[8]{0} custom-call(%c), custom_call_target="x", \
backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  %add.1 = f32[8]{0} add(%c, %d), backend_config={"window_config":{"estimated_cycles":"3"}}
}
"""


def test_cycles_are_added_by_kind_the_most_first():
    scores = "bqhd,bkhd->bhqk"
    assert list(tpu_text.cycles(TEXT).items()) == [
        (Kind(False, "", "copy"), 4076), (Kind(False, "mlp", "copy"), 2000), (Kind(False, "attn", scores), 1000),
        (Kind(True, "attn", scores), 100), (Kind(True, "attn", "reduce_sum"), 5), (Kind(False, "", "add"), 3)]
