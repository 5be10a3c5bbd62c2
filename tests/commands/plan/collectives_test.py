"""The parser, on lines that libtpu 0.0.52 wrote, and the cost model, against sums done by hand."""

import numpy as np
import pytest

from mae_jax.commands.plan import collectives
from mae_jax.commands.plan.collectives import Collective
from mae_jax.commands.plan.tpu import Torus

PAIRS = ",".join(f"{{{i},{i + 64}}}" for i in range(64))
HALVES = ",".join("{" + ",".join(map(str, range(start, start + 64))) + "}" for start in (0, 64))
TEXT = f"""HloModule jit_train_step, is_scheduled=true

%region_0.0.clone (x: f32[], y: f32[]) -> f32[] {{
  ROOT %add.1 = f32[] add(%x, %y)
}}

%all-reduce-scatter (input: f32[1024,3072]) -> f32[528,3072] {{
  %input = f32[1024,3072]{{1,0:T(8,128)}} parameter(0)
  %pad.109 = f32[1056,3072]{{1,0:T(8,128)}} pad(%input, %constant.2484), padding=0_32x0_0
  %all-reduce.449 = f32[1056,3072]{{1,0:T(8,128)}} all-reduce(%pad.109), channel_id=733, replica_groups={{{PAIRS}}}, \
use_global_device_ids=true, to_apply=%region_673.709.clone
  ROOT %dynamic-slice.1 = f32[528,3072]{{1,0:T(8,128)}} dynamic-slice(%all-reduce.449, %multiply.1977, %constant.1)
}}

ENTRY %main.1 (param.1: f32[], param.2: (f32[2], s32[])) -> f32[] {{
  %reduce_scatter.1990 = f32[512,1024]{{1,0:T(8,128)}} reduce-scatter(%bitcast_fusion.84), channel_id=1, \
replica_groups={{{PAIRS}}}, use_global_device_ids=true, dimensions={{0}}, to_apply=%region_976.1055
  %reduce_scatter.2049 = f32[8,3072]{{1,0:T(8,128)}} reduce-scatter(%constant_dynamic-slice_fusion.6), channel_id=1, \
replica_groups={{{HALVES}}}, use_global_device_ids=true, dimensions={{0}}, to_apply=%region_1178.1286
  %all-gather.36 = bf16[512,1024]{{1,0:T(8,128)(2,1)}} all-gather(%fusion.1), channel_id=39, \
replica_groups=[2,64]<=[128], dimensions={{0}}, use_global_device_ids=true
  %all-gather.37 = bf16[1024,1024]{{1,0:T(8,128)(2,1)}} all-gather(%all-gather.36), channel_id=40, \
replica_groups=mesh['axis_0'=2,'axis_1'=64] {{'axis_0'}}, dimensions={{0}}, use_global_device_ids=true
  %all-reduce.474 = (f32[512]{{0:T(512)}}, f32[]{{:T(256)}}, /*index=5*/f32[3,512]{{1,0:T(4,128)}}) all-reduce(%a, %b, \
%c), channel_id=2, replica_groups=mesh['axis_0'=128] {{'axis_0'}}, use_global_device_ids=true, to_apply=%region_0
  %all-reduce.398 = s32[]{{:T(256)}} all-reduce(%fusion.3062), channel_id=662, replica_groups={{}}
  %collective-permute.1 = f32[16,3072]{{1,0:T(8,128)}} collective-permute(%slice.407), channel_id=1, \
source_target_pairs={{{{0,64}},{{1,65}}}}
  ROOT %add.2 = f32[] add(%get-tuple-element.1, %param.1)
}}
"""


def test_the_lines_that_libtpu_writes_are_read():
    found = [(one.kind, one.dtype, one.bytes, one.size, len(one.groups)) for one in collectives.parse(TEXT, 128)]
    assert found == [
        ("reduce-scatter", "f32", 1056 * 3072 * 4, 2, 64),  # libtpu's own: an all-reduce that keeps only one piece
        ("reduce-scatter", "f32", 1024 * 1024 * 4, 2, 64),
        ("reduce-scatter", "f32", 512 * 3072 * 4, 64, 2),
        ("all-gather", "bf16", 512 * 1024 * 2, 64, 2),
        ("all-gather", "bf16", 1024 * 1024 * 2, 2, 64),
        ("all-reduce", "f32", (512 + 1 + 3 * 512) * 4, 128, 1),
        ("all-reduce", "s32", 4, 128, 1),
        ("collective-permute", "f32", 16 * 3072 * 4, 2, 2),
    ]


@pytest.mark.parametrize(("line", "kind", "nbytes"), [
    ("%rs = ((f32[768,64]{1,0}, f32[16]{0}), (f32[96,64]{1,0}, f32[2]{0})) reduce-scatter-start(%a, %b), channel_id=1, "
     "replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}", "reduce-scatter", 4 * (768 * 64 + 16)),
    ("%ag = (bf16[96,64]{1,0}, bf16[768,64]{1,0}) all-gather-start(%a), channel_id=2, "
     "replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}", "all-gather", 2 * 768 * 64),
    ("%ar = f32[179027]{0} all-reduce-start(%a), channel_id=3, replica_groups=mesh['axis_0'=8] {'axis_0'}, "
     "to_apply=%add", "all-reduce", 4 * 179027),
])
def test_the_starts_that_xla_writes_for_gpus_count_the_whole_array_once(line, kind, nbytes):
    found = [(one.kind, one.bytes, one.size) for one in collectives.parse(f"  {line}", 8)]
    assert found == [(kind, nbytes, 8)]


@pytest.mark.parametrize(("text", "groups"), [
    ("replica_groups={{0,1},{2,3}}, to_apply=%r", ((0, 1), (2, 3))),
    ("replica_groups={}, to_apply=%r", ((0, 1, 2, 3),)),
    ("replica_groups=[2,2]<=[4], dimensions={0}", ((0, 1), (2, 3))),
    ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, to_apply=%r", ((0, 1), (2, 3))),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, to_apply=%r", ((0, 2), (1, 3))),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1','axis_0'}, to_apply=%r", ((0, 2, 1, 3),)),
])
def test_the_ways_to_write_groups(text, groups):
    found, = collectives.parse(f"  %x = f32[8]{{0}} all-reduce(%a), channel_id=1, {text}", 4)
    assert found.groups == groups


def test_groups_that_cannot_be_read_are_not_passed_over():
    with pytest.raises(ValueError, match="cannot read the groups"):
        list(collectives.parse("  %x = f32[8] all-reduce(%a), replica_groups=new['a'=2] {'a'}, to_apply=%r", 4))


def test_what_an_asynchronous_collective_carries_besides_its_result_is_not_counted():
    text = """  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}
  %d = f32[8]{0} all-gather-done(%s)
  %p = (bf16[4]{0}, bf16[4]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}
  %r = f32[8]{0} all-reduce-start(%a), replica_groups={{0,1,2,3}}, to_apply=%r"""
    assert [(one.kind, one.bytes) for one in collectives.parse(text, 4)] == [
        ("all-gather", 32), ("collective-permute", 8), ("all-reduce", 32)]


def test_the_copies_of_a_collective_that_other_work_overlaps_are_one():
    line = """  %all-gather.{0} = bf16[512,1536]{{1,0}} all-gather(%p), channel_id=6, dimensions={{0}}, \
replica_groups=mesh['axis_0'=2,'axis_1'=8] {{'axis_0'}}, frontend_attributes={{chain_id="{1}"}}\n"""
    text = line.format(111, 0) + line.format(113, 0) + line.format(115, 0) + line.format(117, 1)
    assert len(list(collectives.parse(text, 16))) == 2


def between(kind: str, shape: str, target: str) -> str:
    """Returns a line that libtpu 0.0.52 writes for a transfer between slices."""
    return f"""  %send.1 = ({shape}{{1,0:T(8,128)}}, u32[], token[]) send(%param.3, %after-all), channel_id=2, \
is_host_transfer=true, frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_host_transfer_rendezvous="psum_0",_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}
  %recv.1 = ({shape}{{1,0:T(8,128)}}, u32[], token[]) recv(%after-all.1), channel_id=3, is_host_transfer=true, \
frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target={target},\
_xla_megascale_transfer_type="{kind}"}}
  %send-done.1 = token[] send-done(%send.1), channel_id=2, is_host_transfer=true, frontend_attributes={{\
_xla_host_transfer_handler_name="xla_megascale_runtime"}}
"""


def test_what_goes_between_slices_takes_each_devices_share_of_its_hosts_network():
    torus = v3_8x8()._replace(slices=4, network_rate=1e9)
    for kind, shape, target, size, milliseconds in (
            ("ALL_REDUCE", "f32[500000]", '"{1,2,3,4}x{0:3}"', 2e6, 3),  # 2 · 2e6 · 3/4 / 1e9
            ("ALL_REDUCE", "f32[500000]", '"{1:2}x{0:3}"', 2e6, 2),
            ("REDUCE_SCATTER", "f32[500000]", '"{1,2,3,4}x{0:3}"', 2e6, 1.5),
            ("ALL_GATHER", "bf16[250000]", '"{1,2,3,4}x{0:3}"', 2e6, 1.5),
            ("ONE_TO_ONE", "f32[500000]", "{{100000->200000},{200000->100000}}", 2e6, 2)):
        one, = found = list(collectives.parse(between(kind, shape, target), 16))
        assert one.bytes == size, kind
        row, = collectives.table(found, torus)
        assert row["seconds"] * 1e3 == pytest.approx(milliseconds), kind
        assert row["kind"].startswith("DCN ")


def test_loops_and_custom_calls_are_named_because_the_compiler_does_not_price_them():
    assert collectives.unpriced(TEXT) == []
    text = """  %w = (s32[], f32[8]) while(%t), condition=%c, body=%b
  %a = f32[8] custom-call(), custom_call_target="AllocateBuffer"
  %c = f32[8] custom-call(%p, %q), custom_call_target="ConcatBitcast"
  %k = f32[8] custom-call(%a), custom_call_target="tpu_custom_call"
  %m = f32[8] custom-call(%a), custom_call_target="priced", backend_config={"cost_estimate":{"flops":"8"}} """
    assert collectives.unpriced(text) == ["custom call tpu_custom_call", "while"]
    assert collectives.withheld_seconds(text) == 1


def v3_8x8() -> Torus:
    """Returns 128 cores of 64 chips: the first 64 devices are the first cores, the next 64 the second ones."""
    chips = [(x, y, 0) for y in range(8) for x in range(8)]
    return Torus(np.array(chips + chips), (True, True, False), 100e9, 450e9)


def milliseconds(kind: str, groups: tuple, size: float, torus: Torus) -> float:
    return size * collectives.seconds_per_byte(kind, groups, torus) * 1e3


FIRST, SECOND = tuple(range(64)), tuple(range(64, 128))
GRADIENTS = 1317e6  # ViT-L with its decoder, float32


def test_a_reduce_scatter_over_the_two_cores_of_a_chip_goes_through_memory():
    pairs = tuple((i, i + 64) for i in range(64))
    # half of the bytes leave each core: 658.5e6 / 450e9
    assert milliseconds("reduce-scatter", pairs, GRADIENTS, v3_8x8()) == pytest.approx(1.4633, abs=1e-4)


def test_cores_of_a_chip_in_groups_of_their_own_share_its_four_links():
    # 658.5e6 · 63/64 = 648.21e6 bytes from each core, 1296.4e6 from each chip, over 4 links of 100e9
    assert milliseconds("reduce-scatter", (FIRST, SECOND), GRADIENTS / 2, v3_8x8()) == pytest.approx(3.2411, abs=1e-4)
    assert milliseconds("reduce-scatter", (FIRST,), GRADIENTS / 2, v3_8x8()) == pytest.approx(1.6205, abs=1e-4)


def test_an_all_reduce_over_all_cores_goes_round_the_torus_twice_and_twice_through_memory():
    # links: 2 · 1317e6 · 63/64 / 400e9 = 6.4821 ms; memory: 2 · 658.5e6 / 450e9 = 2.9267 ms
    found = milliseconds("all-reduce", (FIRST + SECOND,), GRADIENTS, v3_8x8())
    assert found == pytest.approx(6.4821 + 2.9267, abs=2e-4)


def test_the_stages_of_a_reduce_scatter_cost_what_it_costs_at_once():
    torus, pairs = v3_8x8(), tuple((i, i + 64) for i in range(64))
    stages = milliseconds("reduce-scatter", pairs, 1e9, torus) + milliseconds(
        "reduce-scatter", (FIRST, SECOND), 5e8, torus)
    assert stages == pytest.approx(milliseconds("reduce-scatter", (FIRST + SECOND,), 1e9, torus))


def test_a_group_along_one_dimension_has_that_dimensions_links_alone():
    torus = v3_8x8()
    rows = tuple(tuple(range(start, start + 8)) for start in range(0, 64, 8))
    columns = tuple(tuple(range(start, 64, 8)) for start in range(8))
    # 1e9 · 7/8 over 2 links of 100e9
    assert milliseconds("all-gather", rows, 1e9, torus) == pytest.approx(4.375)
    assert milliseconds("all-gather", columns, 1e9, torus) == pytest.approx(4.375)


def test_half_a_ring_and_a_line_have_one_link_and_interleaved_groups_share_it():
    torus = v3_8x8()
    assert milliseconds("all-gather", ((0, 1, 2, 3), (4, 5, 6, 7)), 1e9, torus) == pytest.approx(7.5)  # 3/4 over 1 link
    assert milliseconds("all-gather", ((0, 2, 4, 6), (1, 3, 5, 7)), 1e9, torus) == pytest.approx(15)  # 2 groups on it
    line = torus._replace(rings=(False, False, False))
    assert milliseconds("all-gather", (tuple(range(8)),), 1e9, line) == pytest.approx(8.75)  # 7/8 over 1 link
    assert milliseconds("all-gather", (FIRST,), 1e9, line) == pytest.approx(63 / 64 / 2 * 10)  # 1 link per dimension


def test_a_permutation_costs_its_longest_way_and_an_all_to_all_its_mean_one():
    torus = v3_8x8()
    assert milliseconds("collective-permute", ((0, 64), (64, 0)), 450e6, torus) == pytest.approx(1)  # inside the chip
    assert milliseconds("collective-permute", ((0, 1), (1, 0)), 100e6, torus) == pytest.approx(1)
    assert milliseconds("collective-permute", ((0, 7),), 100e6, torus) == pytest.approx(1)  # round the ring
    assert milliseconds("collective-permute", ((0, 1), (64, 65)), 100e6, torus) == pytest.approx(2)  # both of one chip
    assert milliseconds("collective-permute", ((0, 4),), 100e6, torus) == pytest.approx(4)
    # 7/8 of the bytes, 2 steps on the mean, over 2 links
    assert milliseconds("all-to-all", (tuple(range(8)),), 100e6, torus) == pytest.approx(0.875)


def test_stages_add_up_to_what_one_collective_sends_and_rows_of_a_kind_are_one():
    ones = [Collective("reduce-scatter", "f32", 800, ((0, 1), (2, 3), (4, 5), (6, 7))),
            Collective("reduce-scatter", "f32", 400, ((0, 2, 4, 6), (1, 3, 5, 7))),
            Collective("reduce-scatter", "f32", 40, ((0, 2, 4, 6), (1, 3, 5, 7)))]
    at_once = Collective("reduce-scatter", "f32", 800, (tuple(range(8)),))
    assert ones[0].sent + ones[1].sent == at_once.sent
    rows = collectives.table(ones, None)
    assert [(row["group_size"], row["count"], row["bytes"]) for row in rows] == [(2, 1, 800), (4, 2, 440)]
    assert rows[0]["seconds"] is None
