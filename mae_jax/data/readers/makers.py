"""Makers of batch rows: by position, or from streams that each make some of the rows."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]
MOST_AT_ONCE = 8  # rows per task of a worker process; more save messages, fewer balance the work


@dataclass
class ExampleMaker:
    """Makes rows one by one, in any order, on any worker.

    Attributes:
      example: (list for names of bad images, position of the run) → fields.
      rows: the global rows that are made here.
      size: rows of a global batch.
      first: the step of batch 0.
      examples: replaces `example` if rows are made together: (list, several positions) → fields of each.
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
        """Returns the tasks of a batch, in order: the worker (None: any) and its rows."""
        at_once = max(1, min(MOST_AT_ONCE, len(self.rows) // (2 * workers)))
        starts = range(0, len(self.rows), at_once)
        return [(None, range(start, min(start + at_once, len(self.rows)))) for start in starts]

    def again(self, rows: range) -> list[range]:
        """Splits the rows of a task that a worker did not finish: single rows, so that a bad one is found."""
        return [range(row, row + 1) for row in rows]

    def fill(self, arrays: Batch, number: int, rows: range, bad: deque[str]) -> None:
        """Writes these rows of batch `number` into `arrays`."""
        positions = [(self.first + number) * self.size + int(self.rows[row]) for row in rows]
        made = self.examples(bad, positions) if self.examples else (self.example(bad, each) for each in positions)
        for row, fields in zip(rows, made, strict=True):
            write(fields, arrays, row)


@dataclass
class StreamMaker:
    """Makes rows from streams, in order: each worker runs some of the readers, and makes the rows of those.

    Attributes:
      open: (step, global rows, list for names of bad images) → these rows of the batches step, step + 1, ...
      rows: the global rows that are made here.
      share: number of consecutive global rows that one reader makes.
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
        """Returns the tasks of a batch: each worker, and the rows of its neighboring readers."""
        reader_of = self.rows // self.share
        parts = np.array_split(np.unique(reader_of), workers)
        ends = np.searchsorted(reader_of, [part[-1] for part in parts], "right")
        return [(worker, range(start, stop)) for worker, (start, stop) in
                enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))]

    def again(self, rows: range) -> list[range]:
        """Returns the rows of a task that a worker did not finish, unsplit: the worker that replaces it makes them."""
        return [rows]

    def fill(self, arrays: Batch, number: int, rows: range, bad: deque[str]) -> None:
        """Writes these rows of batch `number` into `arrays`; every call has rows of the same readers."""
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
    """Writes an example's fields into a row of a batch; raises ValueError if a shape differs."""
    for name, array in arrays.items():
        value = np.asarray(fields[name])
        if value.shape != array.shape[1:]:
            raise ValueError(f"{name} of an example has the shape {value.shape}, not {array.shape[1:]}")
        array[row] = value
