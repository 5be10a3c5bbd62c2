"""Batches that worker processes make ahead of time, in order, in memory shared with the run.

grain's `mp_prefetch` (0.2.18) does much of this, and was tried first. It is not used, because: its workers outlive a
run that is killed, and leave their segments in /dev/shm; a full /dev/shm ends them by SIGBUS, reported as exit code -7;
each worker makes whole batches, so that more workers do not speed up the first batch, and each holds batches of its
own; and each batch is a new segment.
"""

import atexit
import contextlib
import functools
import io
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from mae_jax.data.readers import shared_slots, worker_process
from mae_jax.data.readers.makers import Maker
from mae_jax.data.readers.shared_slots import Batch, Layout, Ring
from mae_jax.data.readers.worker_process import Channel
from mae_jax.data.transforms.example import Spec
from mae_jax.errors import UserError

log = logging.getLogger(__name__)
MAX_RESTARTS = 3  # per iterator, after its supervisor died
CODE = "import sys; sys.path[:] = sys.argv[2:]; from mae_jax.data.readers import worker_process; " \
       "worker_process.start(int(sys.argv[1]))"
PRELOADED = ("mae_jax", "tensorflow_datasets")  # packages that the fork server imports for all supervisors
# One thread each, and no device.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu",
               "CUDA_VISIBLE_DEVICES": "", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}


class NotPicklable(Exception):
    """The maker of the examples cannot be sent to other processes."""


class _ForkServer:
    """The process that starts all others. It has its own process group, so that Ctrl-C does not reach it."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair()
        command = [sys.executable, "-c", CODE, str(theirs.fileno()), *sys.path]
        self.process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, pass_fds=[theirs.fileno()],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, process_group=0)
        theirs.close()

    def supervisor(self, memory: int, modules: list[str]) -> Channel:
        """Returns the connection to a new supervisor."""
        ours, theirs = socket.socketpair()
        with theirs:
            worker_process.send_order(self._orders, [theirs.fileno(), memory], modules)
        return Channel(ours.detach())

    def stop(self) -> None:
        """Ends the fork server alone; supervisors end with their iterators."""
        self._orders.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)


_fork_server: _ForkServer | None = None
_starting = threading.Lock()


def _supervisor(memory: int, modules: list[str]) -> Channel:
    """Returns the connection to a new supervisor; starts a fork server if none is alive."""
    global _fork_server
    with _starting:
        if _fork_server and _fork_server.process.poll() is not None:
            _fork_server.stop()
            _fork_server = None
        _fork_server = _fork_server or _ForkServer()
        try:
            return _fork_server.supervisor(memory, modules)
        except OSError:  # it died since the check
            _fork_server.stop()
            _fork_server = _ForkServer()
            return _fork_server.supervisor(memory, modules)


@atexit.register
def _stop() -> None:
    for pool in list(_running):
        pool.stop()
    if _fork_server:
        _fork_server.stop()


class _Pickler(pickle.Pickler):
    """A pickler that records the modules of the pickled values, for the fork server to import."""

    def __init__(self, to: io.BytesIO):
        super().__init__(to, pickle.HIGHEST_PROTOCOL)
        self.modules: set[str] = set()

    def reducer_override(self, value: Any) -> Any:
        module = getattr(value, "__module__", None) or type(value).__module__
        if isinstance(module, str) and module.split(".")[0] in PRELOADED:
            self.modules.add(module)
        return NotImplemented


def _pickled(job: worker_process.Job) -> tuple[bytes, list[str]]:
    """Returns a pickled job, and the modules to import before it is read; raises NotPicklable."""
    content = io.BytesIO()
    pickler = _Pickler(content)
    try:
        pickler.dump(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise NotPicklable(str(error)) from None
    return content.getvalue(), sorted(pickler.modules)


class _Pool:
    """The batches that one supervisor's workers make."""

    def __init__(self, maker: Maker, layout: Layout, count: int, workers: int, plugins: tuple[str, ...],
                 name: Callable[[int, int], str]):
        self._layout, self._count, self._workers, self._plugins, self._name = layout, count, workers, plugins, name
        self._job, self._modules = _pickled(worker_process.Job(maker, layout, workers))
        self._taken, self._restarts = 0, 0
        self._begin()

    def _begin(self) -> None:
        """Starts a supervisor, with new memory: workers of a dead one may still write to the old memory."""
        memory = shared_slots.reserve(self._layout, "data.prefetch or batch_size")
        try:
            self._ring = Ring(self._layout, memory)
            self._supervisor = _supervisor(memory, self._modules)
        finally:
            os.close(memory)
        self._ordered = self._taken  # the next batch to request
        self._slots: dict[int, int] = {}  # number of a batch → its slot
        self._done: dict[int, list[str]] = {}  # number of a complete batch → names of bad images
        with contextlib.suppress(OSError):  # it died: `take` reads the end of its socket
            self._supervisor.send(self._plugins)
            self._supervisor.send_bytes(self._job)

    def take(self, bad: deque[str]) -> Batch:
        """Returns the next batch once it is complete; raises the exception of any example."""
        while True:
            try:
                self._order()
                while self._taken not in self._done or self._supervisor.poll():
                    self._hear(self._supervisor.recv())
                break
            except (EOFError, OSError):
                self._restart()
        number = self._taken
        self._taken += 1
        bad.extend(self._done.pop(number))
        return self._ring.hand_out(self._slots.pop(number))

    def stop(self) -> None:
        """Closes the connection, which ends the processes."""
        self._supervisor.close()

    def _order(self) -> None:
        while self._ordered < self._count and (slot := self._ring.take()) is not None:
            self._slots[self._ordered] = slot
            self._ordered += 1
            self._supervisor.send((self._ordered - 1, slot))

    def _hear(self, message: tuple[Any, ...]) -> None:
        kind, *values = message
        if kind == "done":
            number, names = values
            self._done[number] = names
        elif kind == "died":
            pid, how = values
            log.warning("worker process %d %s%s; another one repeats its examples", pid, how, _why(how, self._workers))
        elif kind == "gave up":
            how, place, where = values
            raise UserError(f"worker processes die repeatedly: the last one {how}{where}"
                            f"{f', {self._name(*place)}' if place else ''}{_why(how, self._workers)}; use threads "
                            "instead, with data.workers=0")
        else:
            raise values[0]

    def _restart(self) -> None:
        self._supervisor.close()
        self._restarts += 1
        if self._restarts > MAX_RESTARTS:
            raise UserError("worker processes cannot be started, or are killed repeatedly; use threads instead, with "
                            "data.workers=0")
        log.warning("the process that leads the worker processes ended; all are restarted")
        self._begin()


def _why(how: str, workers: int) -> str:
    """Returns advice about a death, if its cause is known."""
    lower = f", or fewer data.workers (here {workers})" if workers > 1 else ""
    return f" (the system does so where memory is short: take a smaller batch_size{lower})" if "SIGKILL" in how else ""


_running: weakref.WeakSet[_Pool] = weakref.WeakSet()


def batches(maker: Maker, spec: Spec, count: int, workers: int, ahead: int, plugins: tuple[str, ...],
            bad: deque[str], name: Callable[[int, int], str] = lambda number, row: "") -> Iterator[Batch]:
    """Yields `count` batches of the maker's rows, in order.

    Args:
      maker: picklable; makes the batches 0, 1, ...
      spec: name → shape [B, ...] and dtype of the fields.
      count: number of batches.
      workers: largest number of processes.
      ahead: number of batches made ahead.
      plugins: modules that the workers import first.
      bad: receives the names of bad images, with the batch that they are in.
      name: (number of a batch, row) → name of an example that kills its worker.

    Raises:
      UserError: memory is too small, or workers die again and again.
      NotPicklable: the maker is not picklable, such as one with a plug-in's source made of nested functions.
      The exceptions of the maker, at the next batch.
    """
    workers = min(workers, maker.most_workers())
    layout = Layout.of(spec, len(maker.rows), ahead + 1 + shared_slots.HELD)
    pool = _Pool(maker, layout, count, workers, plugins, name)
    _say(workers)
    return _taken(pool, count, bad)


def _taken(pool: _Pool, count: int, bad: deque[str]) -> Iterator[Batch]:
    _running.add(pool)
    try:
        for _ in range(count):
            yield pool.take(bad)
    finally:
        pool.stop()


@functools.cache
def _say(workers: int) -> None:
    log.info("examples are made by %d worker process%s", workers, "es" * (workers != 1))
