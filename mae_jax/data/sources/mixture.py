"""data.mix: several folders, or other data of one source, each with a weight: "3:/data/photos", "1:/data/drawings".

Weights are relative frequencies of draws, whatever the sizes: of each 4 consecutive draws that begin at a multiple of
4, 3 are photos and 1 is a drawing, in random order. The part of the k-th draw is a function of (seed, k), and so is the
number of earlier draws from that part: each part visits all its examples, in its own random order, before it repeats.
An epoch of the config's durations is as many draws as all parts have examples; evaluations read each example once.
Classes of the same name are merged.
"""

import functools
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import lcm
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.sources.base import UNLABELED, Example, RecordStream, Source
from mae_jax.errors import UserError, pluralize, printable
from mae_jax.rng import example_at

MOST = 10_000  # largest sum of the weights in lowest terms
PART = re.compile(r"(\d+(?:\.\d+)?):(.+)", re.DOTALL)


class Mix(NamedTuple):
    """The parts of data.mix."""

    weights: tuple[int, ...]  # draws from each part, per sum of the weights
    paths: tuple[str, ...]


def parsed(parts: Sequence[str]) -> Mix:
    """Parses data.mix; raises UserError."""
    found = [PART.fullmatch(part) for part in parts]
    for part, match in zip(parts, found, strict=True):
        if not match or not Fraction(match[1]):
            raise UserError(f"data.mix: {printable(part)!r} is not a weight and a path; write ('3:/data/a', "
                            "'1:/data/b')")
    weights = [Fraction(match[1]) for match in found]
    paths = tuple(match[2] for match in found)
    if len(set(paths)) < len(paths):
        raise UserError(f"data.mix names {printable(max(paths, key=paths.count))} twice; add its weights")
    scale = lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    whole = [weight // int(np.gcd.reduce(whole)) for weight in whole]
    if sum(whole) > MOST:
        raise UserError(f"data.mix: weights of {len(str(sum(whole)))} digits; use smaller ones, as 3 and 1")
    return Mix(tuple(whole), paths)


def parts(data: ConfigDict) -> list[ConfigDict]:
    """Returns the config group `data` of each part, or itself for data without a mix; raises UserError."""
    if not data.get("mix"):
        return [data]
    if data.get("path"):
        raise UserError("data.mix and data.path are both given; leave out data.path")
    if data.get("classes"):
        raise UserError("data.classes needs one data set, and data.mix has several")
    each = []
    for path in parsed(data.mix).paths:
        part = data.copy_and_resolve_references()
        part.path, part.mix = path, ()
        each.append(part)
    return each


def mixed(data: ConfigDict, opened: Sequence[Source | RecordStream]) -> Source:
    """Returns the examples of all parts, with training draws by the weights; raises UserError for streams."""
    mix = parsed(data.mix)
    sources = [source for source in opened if isinstance(source, Source)]
    if len(sources) < len(opened):
        raise UserError("data.mix needs random access, which a stream of records does not have; store the records with "
                        "mae_jax inspect --write=array_record")
    if any(source.annotations for source in sources):
        raise UserError("data.mix cannot join data sets of images with objects; write one file of annotations for all "
                        "of them")
    fields = {source.fields for source in sources}
    if len(fields) > 1:
        raise UserError(f"data.mix: some of {', '.join(mix.paths)} have several labels or masks, and some have none")
    classes = _union(sources)
    if "labels" in sources[0].fields and any(source.classes != sources[0].classes for source in sources):
        raise UserError("data.mix: images with several labels need the same classes in all data sets")
    ends = tuple(np.cumsum([source.size for source in sources]).tolist())
    tables = tuple(tuple(classes.index(name) for name in source.classes) for source in sources)
    labels = [source.label for source in sources if source.label]
    label = functools.partial(_label, ends, tables, labels) if len(labels) == len(sources) else None
    read = functools.partial(_read, ends, tables, [source.read for source in sources])
    name = functools.partial(_name, ends, mix.paths, [source.name for source in sources])
    strange = tuple(sorted({name for source in sources for name in source.unknown_classes}))
    return Source(ends[-1], read, name, classes, sources[0].fields, label, strange,
                  functools.partial(drawn, mix.weights, tuple(source.size for source in sources)))


def _place(ends: Sequence[int], index: int) -> tuple[int, int]:
    """Returns the part that has an example, and the index of the example there."""
    part = bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


def _renumbered(table: Sequence[int], own: int) -> int:
    return table[own] if 0 <= own < len(table) else UNLABELED


def _label(ends: Sequence[int], tables: Sequence[Sequence[int]], labels: Sequence[Callable[[int], int]],
           index: int) -> int:
    part, inside = _place(ends, index)
    return _renumbered(tables[part], labels[part](inside))


def _read(ends: Sequence[int], tables: Sequence[Sequence[int]], reads: Sequence[Callable[[int], Example]],
          index: int) -> Example:
    part, inside = _place(ends, index)
    example = reads[part](inside)
    return example._replace(label=_renumbered(tables[part], example.label))


def _name(ends: Sequence[int], paths: Sequence[str], names: Sequence[Callable[[int], str]], index: int) -> str:
    part, inside = _place(ends, index)
    return f"{printable(paths[part])}: {names[part](inside)}"


def drawn(weights: tuple[int, ...], sizes: tuple[int, ...], seed: int, number: int) -> int:
    """Returns the index, among the examples of all parts, that a draw shows, by the draw's number in the run."""
    total = sum(weights)
    block, place = divmod(number, total)
    at = example_at(seed, block, total, place, "mix")
    part, before = 0, 0
    while at >= before + weights[part]:
        part, before = part + 1, before + weights[part]
    turn, place = divmod(block * weights[part] + at - before, sizes[part])
    return sum(sizes[:part]) + example_at(seed, turn, sizes[part], place, f"epoch {part}")


def describe(data: ConfigDict, opened: Mapping[str, Source], lines: Sequence[str]) -> str:
    """Returns a line about the mix, including the line of each part."""
    mix, train = parsed(data.mix), opened["train_split"]
    shares = ", ".join(f"{weight} of {sum(mix.weights)} draws from {printable(path)}"
                       for weight, path in zip(mix.weights, mix.paths, strict=True))
    classes = f" in {len(train.classes)} classes by their names" if train.classes else " without classes"
    each = "; ".join(f"{printable(path)}: {line}" for path, line in zip(mix.paths, lines, strict=True) if line)
    return f"data.mix: {shares}; an epoch is {pluralize(train.size, 'image')}{classes}; {each}"


def _union(sources: Sequence[Source]) -> tuple[str, ...]:
    names = {name for source in sources for name in source.classes}
    return tuple(sorted(names, key=lambda name: (int(name), name) if all(map(str.isdecimal, names)) else (0, name)))
