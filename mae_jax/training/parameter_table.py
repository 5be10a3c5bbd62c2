"""Tables of a model's parameters as text: a summary with one line per kind of module, and a full table."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mae_jax.methods.base import Method
from mae_jax.param_tree import flatten
from mae_jax.training import optim

FILE = "parameters.txt"  # the full table, in the workdir


class Parameter(NamedTuple):
    """A parameter: its shape and dtype, weight decay ('yes', 'no' or 'frozen'), and the factor of its learning rate."""

    shape: tuple[int, ...]
    dtype: str
    decay: str
    lr: float

    @property
    def size(self) -> int:
        size = 1
        for side in self.shape:
            size *= side
        return size


def summary(params: Any, method: Method) -> str:
    """Returns a summary with one line per kind of module; equal blocks share one line.

    Args:
      params: nested dicts of arrays or of their shapes.
      method: the method of the parameters.
    """
    known = _parameters(params, method)
    nested = {name.split("/")[0] for name in known if name.count("/") > 1}
    parts: dict[str, dict[str, Parameter]] = {}
    for name, each in known.items():
        part, rest = _split(name, nested)
        parts.setdefault(part, {})[rest] = each
    kinds = Counter((re.sub(r"block_\d+$", "block_*", part), _alike(inside)) for part, inside in parts.items())
    rows = [["part", "copies", "parameters", "largest", "dtype", "decay", "lr"]]
    for (kind, alike), copies in sorted(kinds.items(), key=lambda each: _place(each[0][0])):
        inside = [each for part, arrays in parts.items() for each in arrays.values()
                  if re.sub(r"block_\d+$", "block_*", part) == kind and _alike(arrays) == alike]
        largest = max(inside, key=lambda each: each.size)
        rows.append([kind, str(copies), f"{sum(each.size for each in inside):,}", str(largest.shape),
                     "/".join(dict.fromkeys(each.dtype for each in inside)), _decay([decay for *_, decay in alike]),
                     _rates([each.lr for each in inside])])
    return "\n".join([*_aligned(rows, (str.ljust, str.rjust, str.rjust, *[str.ljust] * 4)), _total(known)])


def table(params: Any, method: Method) -> str:
    """Returns one line per parameter: name, shape, dtype, weight decay and factor of the learning rate."""
    known = _parameters(params, method)
    rows = [["parameter", "shape", "dtype", "decay", "lr"]]
    rows += [[name, str(each.shape), each.dtype, each.decay, _rates([each.lr])] for name, each in known.items()]
    return "\n".join([*_aligned(rows, [str.ljust] * 5), _total(known)])


def _parameters(params: Any, method: Method) -> dict[str, Parameter]:
    words, o = flatten(optim.decay_words(params, method)), method.config.optim
    rates = {name: optim.layer_rate(name, o.layer_decay, method.config.model.depth) for name in words}
    return {name: Parameter(tuple(leaf.shape), str(leaf.dtype), words[name],
                            0.0 if words[name] == "frozen" else rates[name])
            for name, leaf in flatten(params).items()}


def _split(name: str, nested: set[str]) -> tuple[str, str]:
    """Splits a path into the module, such as encoder/block_03, decoder/norm or head, and the name inside it."""
    names = name.split("/")
    length = 2 if names[0] in nested else 1
    return "/".join(names[:length]), "/".join(names[length:])


def _alike(inside: dict[str, Parameter]) -> tuple[tuple[Any, ...], ...]:
    """Returns (name, shape, decay) of the parameters of a module, which are equal for modules of one kind."""
    return tuple((name, each.shape, each.decay) for name, each in inside.items())


def _place(kind: str) -> tuple[bool, str, int, str]:
    """Returns a sort key: the encoder first; in each module embeddings, then blocks, then the rest."""
    top, _, rest = kind.partition("/")
    return top != "encoder", top, 0 if re.search("embed|token", rest) else 1 if rest == "block_*" else 2, rest


def _decay(words: Sequence[str]) -> str:
    """Returns the common word, or the number of parameters with weight decay."""
    return words[0] if len(set(words)) == 1 else f"{words.count('yes')} of {len(words)}" + (
        f", {words.count('frozen')} frozen" if "frozen" in words else "")


def _rates(rates: Sequence[float]) -> str:
    low, high = min(rates), max(rates)
    return f"x {low:.3g}" if low == high else f"x {low:.3g} to {high:.3g}"


def _aligned(rows: list[list[str]], sides: Sequence[Callable[[str, int], str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip()
            for row in rows]


def _total(known: dict[str, Parameter]) -> str:
    total, frozen = sum(each.size for each in known.values()), sum(
        each.size for each in known.values() if each.decay == "frozen")
    return f"{total:,} parameters" + (f", {total - frozen:,} of them learn" if frozen else "")
