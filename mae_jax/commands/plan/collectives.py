"""The collectives in compiled HLO text, and an estimate of their time on the links of a TPU slice.

The model of one collective of S bytes per device (the size of the whole array, before a reduction or after a gather):

- A group of devices spans c chips, with p devices on each.
- Between chips, a reduce-scatter or an all-gather sends S (c - 1) / c bytes from each chip, an all-reduce twice that.
  It uses rings along all dimensions of the torus that the group spans, at once and in both directions. A dimension
  counts 2 links if the group covers a ring of the torus, else 1, since the end of a line has no second link.
- Concurrent groups that cover the same chips (for example one group per core of a chip) share the links: their bytes
  add up.
- Between the p devices of a chip, S (p - 1) / p bytes are exchanged, for an all-reduce twice that, at the bandwidth of
  a device's memory. (The reads and writes of a device's own operand and result are part of the compiler's seconds:
  compiling single collectives shows that libtpu 0.0.52 prices them as copies.)
- An all-to-all sends the bytes of a reduce-scatter over the mean distance; a permutation takes the time of its longest
  path, over one link.

So an all-reduce over a whole 2-D torus takes 2 S (c - 1) / c / (4 rates). After "How to Scale Your Model", chapter 3
(jax-ml/scaling-book); the sharing of links and the exchange inside a chip are our simplification. The model leaves out
latency, congestion, and overlap of communication with computation.

Several slices: libtpu compiles one of them. Its text has a `send` to its own runtime for each collective over the
data-center network. For n slices each device sends S (n - 1) / n bytes there, for an all-reduce twice that, at its
share of its host's network cards.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mae_jax.commands.plan.tpu import Torus

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
OPERATION = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ({KINDS})(-start)?\(")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
BETWEEN = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = \((\S+), .* send\(.*_xla_megascale_target="
                     r'(?:"\{([\d,:]+)\}x.*_xla_megascale_transfer_type="(\w+)")?')
DCN = "DCN "  # prefix of the kind of a collective between slices
SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
# Custom calls that take no time: they reserve memory, start or end an asynchronous collective (counted once, below), or
# concatenate arrays that are contiguous already.
NO_COST = ("AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast")


class Collective(NamedTuple):
    """One collective in compiled HLO text.

    Attributes:
      kind: all-reduce, reduce-scatter, all-gather, all-to-all or collective-permute; between slices 'DCN all-reduce'.
      dtype: dtype of its arrays, as 'f32'.
      bytes: size of the whole array on one device, before a scatter or after a gather.
      groups: the groups of devices, as positions in the mesh or numbers of slices; pairs (from, to) for a permutation.
    """

    kind: str
    dtype: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Devices per group; 2 for a permutation."""
        return max(map(len, self.groups))

    @property
    def sent(self) -> float:
        """Least number of bytes that each device sends. The stages of one reduction or gather add up to it."""
        share = 1 if self.kind.endswith("permute") else (self.size - 1) / self.size
        return self.bytes * share * (2 if self.kind.endswith("all-reduce") else 1)


def parse(text: str, devices: int) -> Iterator[Collective]:
    """Yields the collectives in HLO text, those of a loop once; raises ValueError for an unknown form of groups."""
    computation, chains = "", set()
    for line in text.splitlines():
        if line.endswith("{") and (found := COMPUTATION.match(line)):
            computation = found[1]
        elif "is_host_transfer=true" in line and (found := BETWEEN.match(line)):
            yield _of_slices(*found.groups())
        elif ("replica_groups=" in line or "source_target_pairs=" in line) and (found := OPERATION.match(line)):
            # The start and the end of an overlapped collective, and the overlapping work, each hold a copy of it.
            if (chain := re.search(r'chain_id="\d+"', line)) and chain[0] in chains:
                continue
            chains |= {chain[0]} if chain else set()
            result, kind, start = found.groups()
            groups = _groups(line, devices)
            members = max(map(len, groups))
            size = _bytes(result)
            if start and kind in ("all-gather", "reduce-scatter"):  # the type of a start is (operands, results)
                size = size * members // (members + 1)
            elif start and kind == "collective-permute":  # (operand, result, two numbers)
                size = (size - 8) // 2
            elif kind == "reduce-scatter":
                size *= members
            elif "all-reduce-scatter" in computation:  # libtpu's fusion: an all-reduce that keeps one shard only
                kind = "reduce-scatter"
            yield Collective(kind, "+".join(sorted({shape[1] for shape in SHAPE.finditer(result)})), size, groups)


def withheld_seconds(text: str) -> float:
    """Returns the seconds missing from the compiler's estimate: libtpu 0.0.52 subtracts one for each ConcatBitcast."""
    return float(text.count('custom_call_target="ConcatBitcast"'))


def _of_slices(shape: str, target: str | None, transfer: str | None) -> Collective:
    """Returns the collective between slices that a `send` with an operand of `shape` starts.

    Its target is the numbers of slices, as '1,2' or '1:2'. A permutation has another form, or none.
    """
    if not target or not transfer:
        return Collective(DCN + "permute", shape.split("[")[0], _bytes(shape), ((0, 1),))
    ranges = [part.split(":") for part in target.split(",")]
    members = sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)
    kind = transfer.lower().replace("_", "-")
    size = _bytes(shape) * (members if kind == "all-gather" else 1)
    return Collective(DCN + kind, shape.split("[")[0], size, (tuple(range(members)),))


def unpriced(text: str) -> list[str]:
    """Returns the parts that the compiler's seconds leave out: loops, branches and the names of custom calls.

    Our own kernels carry a cost estimate (FLOPs and bytes), which the compiler prices.
    """
    found = {f"custom call {call[1]}" for line in text.splitlines() if '"cost_estimate":{' not in line
             for call in re.finditer(r'custom_call_target="([^"]*)"', line) if call[1] not in NO_COST}
    found |= {name for name in ("while", "conditional") if f" {name}(" in text}
    return sorted(found)


def seconds_per_byte(kind: str, groups: tuple[tuple[int, ...], ...], torus: Torus) -> float:
    """Returns the seconds that a collective takes per byte of its array, by the model above."""
    if kind.startswith(DCN):
        return Collective(kind, "", 1, groups).sent / torus.network_rate
    if kind == "collective-permute":
        return _permutation_seconds(groups, torus)
    coords = [torus.coords[list(group)] for group in groups]
    spans = [_span(chips, torus) for chips in coords]
    inside = max(1 - chips / devices for devices, chips, _, _ in spans)
    across = max((1 - 1 / chips) * (distance if kind == "all-to-all" else 1) / max(links, 1)
                 for _, chips, links, distance in spans)
    times = 2 if kind == "all-reduce" else 1
    return times * (inside / torus.hbm_rate + across * _sharing(coords, torus) / torus.link_rate)


def table(collectives: list[Collective], torus: Torus | None) -> list[dict[str, Any]]:
    """Returns one row per kind, dtype and group size, the most bytes first; 'seconds' is None without a torus."""
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    rates: dict[Any, float] = {}
    for one in collectives:
        row = rows.setdefault((one.kind, one.dtype, one.size), {
            "kind": one.kind, "dtype": one.dtype, "group_size": one.size, "count": 0, "bytes": 0, "bytes_sent": 0.0,
            "seconds": 0.0 if torus else None})
        row["count"] += 1
        row["bytes"] += one.bytes
        row["bytes_sent"] += one.sent
        if torus:
            pattern = (one.kind, one.groups)
            if pattern not in rates:
                rates[pattern] = seconds_per_byte(*pattern, torus)
            row["seconds"] += one.bytes * rates[pattern]
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def _bytes(shapes: str) -> int:
    """Returns the total bytes of the arrays in a shape such as '(f32[2,3]{1,0}, bf16[4])'."""
    return sum(int(np.prod([int(size) for size in dims.split(",") if size])) * max(int(bits or 8) // 8, 1)
               for _, bits, dims in SHAPE.findall(shapes))


def _groups(line: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Returns the groups of a collective, or the pairs of a permutation, from its line, in any of XLA's four notations.
    """
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})?\}", line):
        listed = tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", found[1] or ""))
        return listed or (tuple(range(devices)),)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        dims = [int(size) for size in found[3].split(",")]
        axes = [int(axis) for axis in found[4].split(",")] if found[4] else range(len(dims))
        ids = np.arange(devices).reshape(dims).transpose(axes).reshape(int(found[1]), int(found[2]))
        return tuple(map(tuple, ids.tolist()))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        names, along = list(sizes), re.findall(r"'([^']+)'", found[2])
        if set(along) <= set(names) and not re.search(r"[():]", found[2]):
            ids = np.arange(devices).reshape([int(size) for size in sizes.values()])
            rest = [axis for axis in range(len(names)) if names[axis] not in along]
            ids = ids.transpose(rest + [names.index(name) for name in along])
            members = int(np.prod([int(sizes[name]) for name in along]))
            return tuple(map(tuple, ids.reshape(-1, members).tolist()))
    raise ValueError(f"cannot read the groups of the collective {line.strip()[:300]}")


def _span(coords: np.ndarray, torus: Torus) -> tuple[int, int, int, float]:
    """Returns the number of devices and of chips in a group, the links per chip that it uses, and its mean distance.

    `coords` is int [devices, 3], the chips of the group's devices.
    """
    sizes = [len(np.unique(coords[:, axis])) for axis in range(coords.shape[1])]
    whole = [size == all_of_it and ring for size, all_of_it, ring in zip(sizes, torus.shape, torus.rings, strict=True)]
    links = sum((2 if round_ else 1) for size, round_ in zip(sizes, whole, strict=True) if size > 1)
    distance = sum(size / (4 if round_ else 3) for size, round_ in zip(sizes, whole, strict=True) if size > 1)
    return len(coords), len(np.unique(coords, axis=0)), links, distance


def _sharing(groups: list[np.ndarray], torus: Torus) -> int:
    """Returns the largest number of groups that cover one chip; a group covers the bounding box of its chips."""
    covered = np.zeros(torus.shape, int)
    for coords in groups:
        low, high = coords.min(0), coords.max(0)
        if (low != high).any():
            covered[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] += 1
    return max(int(covered.max()), 1)


def _permutation_seconds(pairs: tuple[tuple[int, ...], ...], torus: Torus) -> float:
    """Returns the seconds per byte of a permutation: the longest path times the transfers from one chip, over one link.
    """
    ends = torus.coords[np.array(pairs)]  # [pairs, 2, dimensions]
    steps = np.abs(ends[:, 0] - ends[:, 1])
    steps = np.where(torus.rings, np.minimum(steps, np.array(torus.shape) - steps), steps).sum(1)
    if not steps.any():
        return 1 / torus.hbm_rate
    _, leaving = np.unique(ends[steps > 0, 0], axis=0, return_counts=True)
    return int(steps.max()) * int(leaving.max()) / torus.link_rate
