"""Cost of variants of attention on one TPU chip by the compiler's estimate; no TPU is needed.

  python benchmarks/tpu_attention.py --topology=v5e:1x1 --tokens=197 --width=512 --way=3 --way=3,in_place
  python benchmarks/tpu_attention.py --topology=v5e:1x1 --tokens=50 --width=1024 --way=plain --way=3,2

Compiles the attention of a block with its products, forward and backward pass in one program, and prints for each way
the sum of the compiler's estimated cycles, its seconds, and the --kinds kinds of operation that take the most cycles. A
--way gives the number of times that scores are computed, then the number of heads side by side or 'in_place', then
'inner' if the backward pass sums each head's products by a matrix product. Or it is 'plain', or 'kernel', our own,
which the compiler's cycles leave out. --schedules also reports the cycles of kernels: the instruction bundles (one
cycle each) that the compiler schedules for one program, times the number of programs; for that libtpu writes gigabytes
of text to a temporary folder. --block adds the layer norms and the MLP of a block. Needs libtpu, no TPU; half a minute
per way, with --schedules up to five.
"""

import math
import os
import re
import tempfile
from pathlib import Path
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs, and a TPU of this machine stays free

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mae_jax import errors
from mae_jax.commands import cli
from mae_jax.commands.plan import tpu, tpu_text
from mae_jax.commands.plan.collectives import withheld_seconds
from mae_jax.models.blocks import Attention, Block
from mae_jax.ops import attention, attention_tpu, attention_tpu_kernel
from mae_jax.runtime.sharding import AXES

TOPOLOGY = flags.DEFINE_string("topology", "v5e:1x1", "a TPU slice, of which one device counts")
IMAGES = flags.DEFINE_integer("images", 64, "images per device")
TOKENS = flags.DEFINE_integer("tokens", 197, "tokens per image")
WIDTH = flags.DEFINE_integer("width", 512, "channels of a token")
HEADS = flags.DEFINE_integer("heads", 16, "heads")
BLOCK = flags.DEFINE_bool("block", False, "the whole block")
WAYS = flags.DEFINE_multi_string("way", ["3", "3,in_place"], "a way of attention")
SCHEDULES = flags.DEFINE_bool("schedules", False, "also the cycles of kernels, by their schedules")
KINDS = flags.DEFINE_integer("kinds", 10, "kinds of operation to print of each way")


def implementation(way: str, depth: int) -> attention.Implementation:
    """Returns the attention of heads of that depth which --way describes."""
    if way in ("plain", "kernel"):
        return attention.IMPLEMENTATIONS[{"kernel": "tpu kernel"}.get(way, way)]
    scores, *rest = way.split(",")
    if "in_place" in rest:
        return attention.on_tpu(attention_tpu.Way(int(scores), {}, (depth,)))
    together = next((int(part) for part in rest if part.isdigit()), 1)
    return attention.on_tpu(attention_tpu.Way(int(scores), {depth: together}, inner_by_product="inner" in rest))


def compiled(device: jax.Device) -> jax.stages.Compiled:
    """Compiles both passes of the attention for one device."""
    mesh = Mesh(np.array(device).reshape(1, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    module = Block(HEADS.value, 4, "erf", jnp.bfloat16) if BLOCK.value else Attention(HEADS.value, jnp.bfloat16)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    def passes(params: dict, x: jax.Array, dy: jax.Array) -> tuple:
        y, backward = jax.vjp(module.apply, params, x)
        return y, backward(dy)

    x = placed(jax.ShapeDtypeStruct((IMAGES.value, TOKENS.value, WIDTH.value), jnp.bfloat16))
    with jax.set_mesh(mesh):
        params = jax.eval_shape(lambda x: linen.Module.init(module, jax.random.key(0), x), x)
        return jax.jit(passes).lower(jax.tree.map(placed, params), x, x).compile()


def kernel_cycles(schedules: Path) -> int:
    """Returns the cycles of the kernels' schedules, 0 where there is none; removes what was written of them."""
    total, programs = 0, attention_tpu_kernel.grid(IMAGES.value, TOKENS.value, WIDTH.value)
    for file in schedules.iterdir():
        if re.search(r"-attention(_gradient)?\.\d+-\d+-schedule-analysis_packed-bundles-post-ra", file.name):
            total += int(re.search(r"total scheduled bundles: *(\d+)", file.read_text())[1]) * math.prod(programs)
        file.unlink()
    return total


def main() -> int:
    if not SCHEDULES.value:
        return compare(None)
    with tempfile.TemporaryDirectory(prefix="tpu_attention_") as schedules:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={schedules} --xla_jf_dump_llo_text=true"  # read with libtpu
        return compare(Path(schedules))


def compare(schedules: Path | None) -> int:
    device = tpu.devices(TOPOLOGY.value)[0]
    for way in WAYS.value:
        own = implementation(way, WIDTH.value // HEADS.value)
        with mock.patch.dict(attention.IMPLEMENTATIONS, dict.fromkeys((*attention_tpu.WAYS, "tpu kernel"), own)):
            program = compiled(device)
        text, kinds = program.as_text(), tpu_text.cycles(program.as_text())
        seconds = program.cost_analysis()["optimal_seconds"] + withheld_seconds(text)
        more = f"; kernels {kernel_cycles(schedules) / 1e6:.2f} Mcycles more" if schedules else ""
        print(f"{way}: {sum(kinds.values()) / 1e6:.2f} Mcycles, {seconds * 1e3:.2f} ms{more}", flush=True)
        for kind, number in list(kinds.items())[: KINDS.value]:
            print(f"{number / 1e6:9.3f}  {'backward' if kind.backward else 'forward':8}  {kind.operation}", flush=True)
    return errors.FINISHED


if __name__ == "__main__":
    cli.run(main, __doc__)
