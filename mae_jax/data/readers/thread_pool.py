"""Batches of examples that threads make ahead of time, in order."""

import atexit
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mae_jax.data.readers.makers import Batch
from mae_jax.data.transforms.example import Spec

Fill = Callable[[Batch, int, range], None]
JOIN_SECONDS = 10.0  # for a thread to finish its example when the process ends


class _Filling:
    """An unfinished batch."""

    def __init__(self, spec: Spec, size: int):
        self.arrays = {name: np.empty((size, *struct.shape[1:]), struct.dtype) for name, struct in spec.items()}
        self.left = size


class _Makers:
    """The threads, and the batches they work on.

    Threads take parts of batches in order, up to `ahead` batches after the next one to be taken.
    """

    def __init__(self, fill: Fill, spec: Spec, parts: Sequence[range], count: int, workers: int, ahead: int):
        self._fill, self._spec, self._parts, self._count, self._ahead = fill, spec, parts, count, ahead
        self._changed = threading.Condition()
        self._filling: dict[int, _Filling] = {}  # number of a batch → the batch
        self._next = self._taken = 0  # part, batch
        self._failure: BaseException | None = None
        self._stopped = False
        self._threads = [threading.Thread(target=self._make, name=f"examples-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def take(self) -> Batch:
        """Returns the next batch once it is complete; raises the exception of any example."""
        with self._changed:
            number = self._taken
            self._changed.wait_for(lambda: self._failure or (
                number in self._filling and not self._filling[number].left))
            if self._failure:
                raise self._failure
            self._taken += 1
            self._changed.notify_all()
            return self._filling.pop(number).arrays

    def stop(self, seconds: float = 0.0) -> None:
        """Tells the threads to end after their example; waits at most `seconds` for each."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads if seconds else ():
            thread.join(seconds)

    def _make(self) -> None:
        while (count := self._claim()) is not None:
            number, part = divmod(count, len(self._parts))
            batch, rows = self._filling[number], self._parts[part]
            try:
                self._fill(batch.arrays, number, rows)
            except BaseException as error:
                with self._changed:
                    self._failure = self._failure or error
                    self._stopped = True
                    self._changed.notify_all()
                return
            with self._changed:
                batch.left -= len(rows)
                if not batch.left:
                    self._changed.notify_all()

    def _claim(self) -> int | None:
        """Returns the index of the next part, and allocates its batch; None if there is none, or after `stop`."""
        with self._changed:
            while not self._stopped and self._next < self._count * len(self._parts):
                number = self._next // len(self._parts)
                if number <= self._taken + self._ahead:
                    if number not in self._filling:
                        self._filling[number] = _Filling(self._spec, self._parts[-1].stop)
                    self._next += 1
                    return self._next - 1
                self._changed.wait()
            return None


def batches(fill: Fill, spec: Spec, parts: Sequence[range], count: int, workers: int, ahead: int) -> Iterator[Batch]:
    """Yields `count` batches, in order.

    Args:
      fill: (arrays of a batch, its number, rows) → writes these rows; called from many threads.
      spec: name → shape [B, ...] and dtype of the fields.
      parts: the rows that are made at once, covering a batch in order.
      count: number of batches.
      workers: number of threads.
      ahead: number of batches made ahead.

    Raises:
      The exceptions of `fill`, at the next batch.
    """
    makers = _Makers(fill, spec, parts, count, workers, ahead)
    _running.add(makers)
    try:
        for _ in range(count):
            yield makers.take()
    finally:
        makers.stop()


_running: weakref.WeakSet[_Makers] = weakref.WeakSet()


@atexit.register
def _stop() -> None:
    """Ends running threads, so that none is inside an image library when the interpreter shuts down."""
    running = list(_running)
    for makers in running:
        makers.stop()
    for makers in running:
        makers.stop(JOIN_SECONDS)
