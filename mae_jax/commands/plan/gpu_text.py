"""The kernels in HLO text that XLA compiled for a GPU, and the bytes that each moves to and from the GPU's memory.

Each instruction of the entry computation, or of a computation that it calls, counts as one kernel: a fusion, a product,
a custom call or a copy. It reads its operands and writes its results, including a library's workspace, once. Values
inside a fusion stay in registers and on-chip memory. A loop's kernels count once per trip, and every branch counts as
taken.

The bytes divided by the memory bandwidth are a lower bound of the step time.
"""

import collections
import math
import re
from typing import NamedTuple

# Bits of the element types of a step; sub-byte types count as a byte, as they are stored.
BITS = {"pred": 8, "s4": 8, "u4": 8, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32,
        "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
        "f8e4m3fn": 8, "f8e5m2": 8}
SHAPE = re.compile(rf"\b({'|'.join(BITS)})\[([\d,]*)\]")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*)$")
NAME = re.compile(r"%?([\w.\-]+)")
CALLED = re.compile(r"(?:body|to_apply|calls|branch_computations)=\{?%?([\w.\-]+(?:, *%?[\w.\-]+)*)")
TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"')
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all")  # instructions without a kernel
LIMIT = 64  # depth of nested calls; real text has far fewer


class Kernel(NamedTuple):
    """One kernel in HLO text.

    Attributes:
      name: name of the instruction.
      kind: the operation; for a fusion also its kind, for a custom call its target.
      bytes: bytes of operands and results, in one run.
      runs: number of runs per step.
      shape: shape of the results, as text.
      source: JAX's name of the operation (`op_name`); '' if the text has none.
      line: the instruction.
    """

    name: str
    kind: str
    bytes: int
    runs: int
    shape: str
    source: str
    line: str


def kernels(text: str) -> list[Kernel]:
    """Returns the kernels in HLO text, in its order; kernels of a loop have its trip count as `runs`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry = _computations(text)
    if entry not in computations:
        raise ValueError("the text has no entry computation")
    sizes = {}  # of every instruction's results
    for lines in computations.values():
        for line in lines:
            if found := INSTRUCTION.match(line):
                sizes[found[1]] = size(found[2])
    return list(_walk(computations, sizes, entry, 1, LIMIT))


def size(shape: str) -> int:
    """Returns the total bytes of the arrays in a shape such as '(f32[2,3]{1,0}, bf16[4])'."""
    return sum(BITS[dtype] // 8 * math.prod(int(length) for length in lengths.split(",") if length)
               for dtype, lengths in SHAPE.findall(shape))


def count(found: list[Kernel]) -> int:
    """Returns the number of kernel launches per step."""
    return sum(kernel.runs for kernel in found)


def moved(found: list[Kernel]) -> int:
    """Returns the bytes that the kernels move per step."""
    return sum(kernel.bytes * kernel.runs for kernel in found)


def by_kind(found: list[Kernel]) -> dict[str, tuple[int, int]]:
    """Returns kind → (launches, bytes) per step, the most bytes first."""
    launches, total = collections.Counter(), collections.Counter()
    for kernel in found:
        launches[kernel.kind] += kernel.runs
        total[kernel.kind] += kernel.runs * kernel.bytes
    return {kind: (launches[kind], nbytes) for kind, nbytes in total.most_common()}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the instructions of each computation, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if line.endswith("{") and (found := COMPUTATION.match(line)):
            current = found[2]
            computations[current] = []
            entry = current if found[1] else entry
        elif line.startswith("}"):
            current = ""
        elif current and "=" in line:
            computations[current].append(line.strip())
    return computations, entry


def _walk(computations: dict[str, list[str]], sizes: dict[str, int], name: str, runs: int, depth: int) -> list[Kernel]:
    out: list[Kernel] = []
    for line in computations.get(name, []) if depth else []:
        found = INSTRUCTION.match(line)
        if not found or found[3] in FREE:
            continue
        result, shape, operation, rest = found.groups()
        if operation in ("while", "call", "conditional"):
            trips = TRIPS.search(line) if operation == "while" else None
            for names in CALLED.findall(line):
                for called in NAME.findall(names):
                    out += _walk(computations, sizes, called, runs * int(trips[1] if trips else 1), depth - 1)
            if operation != "conditional":  # a conditional also counts itself: it copies its result
                continue
        operands = [sizes[operand] for operand in NAME.findall(rest.split(")", 1)[0]) if operand in sizes]
        source = re.search(r'op_name="([^"]+)"', line)
        out.append(Kernel(result, _kind(operation, line), sizes[result] + sum(operands), runs, shape,
                          source[1] if source else "", line))
    return out


def _kind(operation: str, line: str) -> str:
    if operation == "custom-call" and (target := re.search(r'custom_call_target="([^"]+)"', line)):
        return target[1]
    if operation == "fusion":
        kind = re.search(r"kind=(\w+)", line)
        return "fusion:triton" if "__triton" in line else f"fusion:{kind[1] if kind else ''}"
    return operation
