"""The compiler's cycles in the text that it compiles for a TPU, by kind of operation: a profile without a TPU.

libtpu writes `estimated_cycles` at each instruction that it prices. Unlike its seconds, which are the longer of
multiplications at the peak and bytes at the memory's rate, these cycles also price what fills a matrix unit badly, the
vector unit, and copies between layouts.
"""

import re
from collections import Counter
from typing import NamedTuple

INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = (?:\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\(")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
SOURCE = re.compile(r'op_name="([^"]*)"')
UNKNOWN = 2**60  # cycles of that many and above stand for none
MOVES = ("copy", "transpose", "reshape", "copy-start", "slice-start", "convert")  # opcodes that compute nothing


class Kind(NamedTuple):
    """What instructions that are counted together have in common.

    Attributes:
      backward: whether they are of a gradient.
      scope: 'attn', 'mlp', 'norm', ..., the module that JAX names; '' where it names none.
      operation: of JAX, as 'bhqk,bkhd->bqhd'; the compiler's opcode where that only moves values.
    """

    backward: bool
    scope: str
    operation: str


def cycles(text: str) -> dict[Kind, int]:
    """Returns the estimated cycles of each kind of operation in a compiled text, the most first."""
    found: Counter[Kind] = Counter()
    for line in text.splitlines():
        number, instruction = CYCLES.search(line), INSTRUCTION.match(line)
        if number and instruction and int(number[1]) < UNKNOWN:
            source = SOURCE.search(line)
            found[kind(instruction[1], source[1] if source else "")] += int(number[1])
    return dict(found.most_common())


def kind(opcode: str, source: str) -> Kind:
    """Returns the kind of an instruction of that opcode, made of what JAX calls `source`."""
    names = re.sub(r"\w+\(+|\)", "", source).split("/")
    scopes = [name for name in names if re.fullmatch(r"attn|mlp|experts|norm\d?|head|embed|patch_embed", name)]
    made = next((name for name in names if "->" in name), names[-1]) or opcode
    operation = opcode if opcode in MOVES else made
    return Kind("transpose(jvp" in source, scopes[-1] if scopes else "", operation)
