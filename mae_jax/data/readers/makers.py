"""What makes the rows of batches: a function of the position, or streams that each make some of the rows."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]
MOST_AT_ONCE = 8  # rows that a worker process is given at once; more save messages, fewer share the work out evenly


@dataclass
class ExampleMaker:
    """Rows that are made one by one, in any order, by anyone.

    Attributes:
      example: names of what is bad, to add to; position of the run → fields.
      rows: the global rows that are made here.
      size: rows of a global batch.
      first: the step of batch 0.
      examples: where rows are made together, the same of several positions; in place of `example`.
    """

    example: Callable[[deque[str], int], Mapping[str, Any]]
    rows: np.ndarray
    size: int
    first: int
    examples: Callable[[deque[str], Sequence[int]], Sequence[Mapping[str, Any]]] | None = None

    def most_workers(self) -> int:
        """Returns how many workers can share the rows of a batch."""
        return len(self.rows)

    def tasks(self, workers: int) -> list[tuple[int | None, range]]:
        """Returns the parts of a batch that are made one after another: who makes each (None: anyone), which rows."""
        at_once = max(1, min(MOST_AT_ONCE, len(self.rows) // (2 * workers)))
        starts = range(0, len(self.rows), at_once)
        return [(None, range(start, min(start + at_once, len(self.rows)))) for start in starts]

    def again(self, rows: range) -> list[range]:
        """Returns the parts of what a worker did not finish, for another: single rows, so that a bad one is found."""
        return [range(row, row + 1) for row in rows]

    def fill(self, arrays: Batch, number: int, rows: range, bad: deque[str]) -> None:
        """Writes these rows of a batch."""
        positions = [(self.first + number) * self.size + int(self.rows[row]) for row in rows]
        made = self.examples(bad, positions) if self.examples else (self.example(bad, each) for each in positions)
        for row, fields in zip(rows, made, strict=True):
            write(fields, arrays, row)


@dataclass
class StreamMaker:
    """Rows that streams make, in their order: each worker runs some of the readers, and makes the rows that are theirs.

    Attributes:
      open: step, global rows, names of what is bad → these rows of the batches step, step + 1, ...
      rows: the global rows that are made here.
      share: so many consecutive global rows are of one reader.
      first: the step of batch 0.
    """

    open: Callable[[int, np.ndarray, deque[str]], Iterator[Batch]]
    rows: np.ndarray
    share: int
    first: int
    _next: int = -1
    _batches: Iterator[Batch] = field(default_factory=lambda: iter(()))
    _bad: deque[str] = field(default_factory=deque)

    def most_workers(self) -> int:
        """Returns how many workers can share the readers."""
        return len(np.unique(self.rows // self.share))

    def tasks(self, workers: int) -> list[tuple[int | None, range]]:
        """Returns which rows each worker makes: those of neighbouring readers."""
        reader_of = self.rows // self.share
        parts = np.array_split(np.unique(reader_of), workers)
        ends = np.searchsorted(reader_of, [part[-1] for part in parts], "right")
        return [(worker, range(start, stop)) for worker, (start, stop) in
                enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))]

    def again(self, rows: range) -> list[range]:
        """Returns the parts of what a worker did not finish: it is the worker that is there in its place."""
        return [rows]

    def fill(self, arrays: Batch, number: int, rows: range, bad: deque[str]) -> None:
        """Writes these rows of a batch; they are those of the same readers each time."""
        if number != self._next:
            self._bad = deque()
            own = self.rows[rows.start : rows.stop]
            self._batches, self._next = self.open(self.first + number, own, self._bad), number
        batch = next(self._batches)
        self._next += 1
        for name, array in arrays.items():
            array[rows.start : rows.stop] = batch[name]
        while self._bad:
            bad.append(self._bad.popleft())


Maker = ExampleMaker | StreamMaker


def write(fields: Mapping[str, Any], arrays: Batch, row: int) -> None:
    """Writes an example's fields into a row of a batch."""
    for name, array in arrays.items():
        value = np.asarray(fields[name])
        if value.shape != array.shape[1:]:
            raise ValueError(f"{name} of an example has the shape {value.shape}, not {array.shape[1:]}")
        array[row] = value
