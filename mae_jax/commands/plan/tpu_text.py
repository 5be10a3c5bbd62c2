"""The compiler's estimated cycles in HLO text for a TPU, by kind of operation: a profile without a TPU.

libtpu writes `estimated_cycles` at each instruction that it prices. Its seconds are the larger of multiplications at
the peak rate and bytes at the memory bandwidth. The cycles also include poor utilization of the matrix unit, the
vector unit, and copies between layouts.
"""

import re
from collections import Counter
from typing import NamedTuple

INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = (?:\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\(")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
SOURCE = re.compile(r'op_name="([^"]*)"')
UNKNOWN = 2**60  # this many cycles and above mean that there is no estimate
MOVES = ("copy", "transpose", "reshape", "copy-start", "slice-start", "convert")  # opcodes that compute nothing


class Kind(NamedTuple):
    """A group of instructions that are counted together.

    Attributes:
      backward: whether they are of the backward pass.
      scope: the module in JAX's `op_name`, as 'attn', 'mlp' or 'norm'; '' if there is none.
      operation: JAX's operation, as 'bhqk,bkhd->bqhd'; the compiler's opcode if the instruction only moves values.
    """

    backward: bool
    scope: str
    operation: str


def cycles(text: str) -> dict[Kind, int]:
    """Returns kind of operation → estimated cycles in HLO text, the most first."""
    found: Counter[Kind] = Counter()
    for line in text.splitlines():
        number, instruction = CYCLES.search(line), INSTRUCTION.match(line)
        if number and instruction and int(number[1]) < UNKNOWN:
            source = SOURCE.search(line)
            found[kind(instruction[1], source[1] if source else "")] += int(number[1])
    return dict(found.most_common())


def kind(opcode: str, source: str) -> Kind:
    """Returns the kind of an instruction, from its opcode and its `op_name` in JAX."""
    names = re.sub(r"\w+\(+|\)", "", source).split("/")
    scopes = [name for name in names if re.fullmatch(r"attn|mlp|experts|norm\d?|head|embed|patch_embed", name)]
    made = next((name for name in names if "->" in name), names[-1]) or opcode
    operation = opcode if opcode in MOVES else made
    return Kind("transpose(jvp" in source, scopes[-1] if scopes else "", operation)
