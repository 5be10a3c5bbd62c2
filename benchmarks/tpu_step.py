"""Ablations of the train step on TPUs by the compiler's own estimate: the step without each of its properties.

  python benchmarks/tpu_step.py --config=configs/vit_l_mae.py      (needs libtpu, no TPU; two to five minutes per row)
  python benchmarks/tpu_step.py --only=final --config=configs/vit_b_mae.py --topology=v3:4x4 --config.batch_size=1024

Compiles the step ahead of time for TPU cores, and writes a line per row to --to: seconds (`optimal_seconds`: for each
operation the larger of its multiplications at the peak rate and its bytes at the memory bandwidth; no communication),
gigabytes moved to and from a core's memory, gibibytes held in it, and the sum of the compiler's estimated cycles, which
also price the vector unit. The --kinds kinds of operation with the most cycles are printed. Rows that --to already has
are skipped.

On chips with much on-chip memory (v5e, v6e) "bytes accessed" also counts the traffic to it.
"""

import contextlib
import functools
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs, and a TPU of this machine stays free

import jax
from absl import flags

from mae_jax import errors, param_tree
from mae_jax.commands import cli
from mae_jax.commands.plan import tpu as plan_tpu
from mae_jax.commands.plan import tpu_text
from mae_jax.commands.plan.collectives import withheld_seconds
from mae_jax.data import ASSUMED
from mae_jax.ops import attention, attention_tpu, linear
from mae_jax.training.train_step import build

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string("topology", "v3:8x8", "the TPU slice")
TO = flags.DEFINE_string("to", "benchmarks/results/tpu_step.jsonl", "JSON lines to add to")
KINDS = flags.DEFINE_integer("kinds", 25, "kinds of operation to print of each row")
ONLY = flags.DEFINE_list("only", [], "rows to do; all when empty")
GIB = 2**30


@contextlib.contextmanager
def elsewhere(*names: str) -> Iterator[None]:
    """Takes what other platforms do, where the function for TPUs has one of these names."""
    choose = jax.lax.platform_dependent

    def other(*args, tpu, default):
        name = getattr(tpu, "func", tpu).__name__
        return default(*args) if name in names else choose(*args, tpu=tpu, default=default)

    with mock.patch.object(jax.lax, "platform_dependent", other):
        yield


def attending(way: Callable[[attention_tpu.Way], attention.Implementation]) -> Callable[[], Any]:
    """Returns what replaces attention on every kind of TPU by what `way` makes of its own."""
    return functools.partial(mock.patch.dict, attention.IMPLEMENTATIONS,
                             {kind: way(attention_tpu.WAYS[kind]) for kind in attention_tpu.WAYS})


# Row → config fields that differ, and what takes the property away.
ROWS = {
    "final": ({}, contextlib.nullcontext),
    "optimiser and parameters whole on every core": ({"mesh.zero": "off"}, contextlib.nullcontext),
    "gradients summed in bfloat16": ({"mesh.reduce": "bfloat16"}, contextlib.nullcontext),
    "tokens flattened before products": ({}, functools.partial(elsewhere, "whole")),
    "attention as on other platforms": ({}, attending(lambda way: attention.IMPLEMENTATIONS["plain"])),
    "attention as on TPU v3": ({}, attending(lambda way: attention.IMPLEMENTATIONS["TPU v3"])),
    "heads of 64 apart": ({}, attending(lambda way: attention.on_tpu(way._replace(side_by_side={}, in_place=())))),
    "positions looked up": ({}, functools.partial(elsewhere, "one_hot")),
    "what GELU saves not rounded": ({}, functools.partial(mock.patch.object, linear, "_as_rounded", lambda x: x)),
    "GELU by tanh": ({"model.gelu": "tanh"}, contextlib.nullcontext),
}


def figures(fields: dict[str, object]) -> dict[str, float]:
    """Compiles the step of the config with `fields` changed, and prints a profile."""
    config = CONFIG.value.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict({"model.dtype": "bfloat16", **fields})
    program = build(config, ASSUMED, plan_tpu.devices(TOPOLOGY.value))
    began = time.monotonic()
    with jax.set_mesh(program.mesh):
        compiled = program.step.lower(program.state, program.batch).compile()
    seconds = time.monotonic() - began
    cost, memory, text = compiled.cost_analysis(), compiled.memory_analysis(), compiled.as_text()
    cycles = tpu_text.cycles(text)
    for kind, number in list(cycles.items())[: KINDS.value]:
        print(f"{number / 1e6:9.3f} Mcycles  {'backward' if kind.backward else 'forward':8}  {kind.scope:11}  "
              f"{kind.operation}", flush=True)
    return {"compiler_seconds": cost["optimal_seconds"] + withheld_seconds(text),
            "gb_moved": cost["bytes accessed"] / 1e9,
            "gib_held": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / GIB,
            "tflop": cost["flops"] / 1e12, "megacycles": sum(cycles.values()) / 1e6,
            "compile_seconds": seconds}


def main() -> int:
    to = Path(TO.value)
    lines = [json.loads(line) for line in to.read_text().splitlines()] if to.exists() else []
    done = [{key: line[key] for key in ("row", "topology", "config")} for line in lines]
    config = zlib.crc32(json.dumps(param_tree.flat(CONFIG.value), sort_keys=True).encode())
    for row in ONLY.value or ROWS:
        what = {"row": row, "topology": TOPOLOGY.value, "config": config}
        if what in done:
            continue
        fields, without = ROWS[row]
        with without():
            found = what | figures(fields)
        print(json.dumps(found), flush=True)
        with to.open("a") as file:
            file.write(json.dumps(found) + "\n")
    return errors.FINISHED


if __name__ == "__main__":
    cli.run(main, __doc__)
