"""Memory, kernels, bytes, FLOPs and collectives of a train step that XLA compiles for a GPU, and their time.

The time is the sum of three terms: the bytes that all kernels move, at the rate that copies reach; the FLOPs of the
matrix products, at the rate that large products reach; and the collectives, at the full rate of the links. In a group
of n GPUs each sends S (n - 1) / n bytes of an array of S bytes, for an all-reduce twice that, as NCCL's rings do. The
estimate leaves out a collective's traffic in a card's own memory, the workspace of libraries, launches and any overlap.
It is 78 ms for a step of ViT-B that took 81 ms on an H100.
"""

import math
import re
import time
from typing import Any

import jax

from mae_jax.commands.plan import collectives, gpu, gpu_text
from mae_jax.commands.plan.tpu import quiet_stderr
from mae_jax.training.train_step import TrainStep

LINKED = re.compile(rf"({collectives.KINDS})(-start|-done)?|async-(start|update|done)")
DIMENSIONS = re.compile(r"\b[a-z]\w*\[([\d,]*)\]")
WORKSPACE = re.compile(r"\b[su]8\[(\d+)\]")  # the last result of a library call
Shapes = dict[str, tuple[int, ...]]


def compiled(program: TrainStep, card: gpu.Card) -> dict[str, Any]:
    """Compiles the step for the mesh's GPUs; returns the values of `cost.measure`, sizes in bytes per device."""
    began, devices = time.monotonic(), program.mesh.size
    with jax.set_mesh(program.mesh), quiet_stderr():  # XLA warns of slow compilations on stderr
        traced = program.step.trace(program.state, program.batch)
        step = traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=gpu.COMPILER_OPTIONS)
    memory, text = step.memory_analysis(), step.as_text()
    kernels, unlinked = gpu_text.kernels(text), []
    sent: list[collectives.Collective] = []
    for kernel in kernels:
        if LINKED.fullmatch(kernel.kind):
            sent += kernel.runs * list(collectives.parse(kernel.line, devices))
        else:
            unlinked.append(kernel)
    rows = collectives.table(sent, None)
    return {
        "short": None,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "total_bytes": (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
                        + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes),
        "flops": product_flops(text, kernels),
        "bytes_accessed": gpu_text.moved(unlinked) - (lent := workspace(kernels)),
        "workspace_bytes": lent,
        "kernels": [{"kind": kind, "count": count, "bytes": moved}
                    for kind, (count, moved) in gpu_text.by_kind(kernels).items()],
        "unpriced": ["loops of unknown length"] if unknown_loops(text) else [],
        "collectives": [row | {"seconds": row["bytes_sent"] / card.link_rate} for row in rows],
        "compile_seconds": time.monotonic() - began,
    }


def workspace(kernels: list[gpu_text.Kernel]) -> int:
    """Returns the bytes of the workspace of library calls, which gpu_text counts as written."""
    return sum(kernel.runs * sum(map(int, WORKSPACE.findall(kernel.shape))) for kernel in kernels
               if kernel.kind.startswith("__cu"))


def unknown_loops(text: str) -> bool:
    """Returns whether the text has a loop without a known trip count, whose kernels are then counted once."""
    return any(" while(" in line and not gpu_text.TRIPS.search(line) for line in text.splitlines())


def product_flops(text: str, kernels: list[gpu_text.Kernel]) -> int:
    """Returns the FLOPs of a step's matrix products, including those of cuDNN's attention."""
    shapes = {}
    for line in text.splitlines():
        if (found := gpu_text.INSTRUCTION.match(line.strip())) and (dims := DIMENSIONS.search(found[2])):
            shapes[found[1]] = tuple(int(size) for size in dims[1].split(",") if size)
    return sum(kernel.runs * _flops(kernel, shapes) for kernel in kernels)


def _flops(kernel: gpu_text.Kernel, shapes: Shapes) -> int:
    if kernel.kind.startswith("__cublas"):
        contracted = _listed("lhs_contracting_dimensions", kernel.line)
        left = shapes[gpu_text.NAME.findall(kernel.line.split(" custom-call(")[1])[0]]
        return 2 * math.prod(shapes[kernel.name]) * math.prod(left[axis] for axis in contracted)
    if kernel.kind.startswith("__cudnn$fmha"):
        # Forward: queries with keys, weights with values. Backward: the scores again, and the gradients of all four.
        products = 5 if "Backward" in kernel.kind else 2
        scores = _listed("dimensions", kernel.line)  # [batch, heads, queries, keys]
        return 2 * products * math.prod(scores) * shapes[kernel.name][-1]
    return 0


def _listed(name: str, line: str) -> list[int]:
    """Returns the first list of this name in the line's backend_config, whose numbers are quoted."""
    found = re.search(rf'"{name}": ?\[([\d", ]*)\]', line)
    return [int(number) for number in re.findall(r"\d+", found[1])] if found else []
