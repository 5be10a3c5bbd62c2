"""The processes that make examples: they write rows of batches into memory shared with the run.

The run starts one process, the fork server, which imports the modules that make examples, but not JAX, and TensorFlow
only if the data need it. For each iterator over batches it forks a supervisor. The supervisor unpickles the maker,
forks the workers, which share its memory copy-on-write, and assigns rows to them. Forking is safe here: none of these
processes has threads yet.

When the run ends in any way, the fork server and the supervisors read the end of their sockets; workers also end with
their supervisor, by PR_SET_PDEATHSIG. Signals of terminals and service managers are left to the run. A worker that is
killed is replaced, and its rows are made again: an example is a function of its position.
"""

import contextlib
import ctypes
import functools
import importlib
import io
import mmap
import os
import pickle
import selectors
import signal
import socket
import struct
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn

from mae_jax import plugins
from mae_jax.data.readers.makers import Maker
from mae_jax.data.readers.shared_slots import Batch, Layout
from mae_jax.errors import UserError

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the run handles them, and these processes end with it
AT_ONCE = 2  # tasks per worker: the current one and the next
HEAD = 4  # bytes of an order that hold the length of the module names
MAX_DEATHS = 100  # workers of one iterator
PR_SET_PDEATHSIG = 1


class Channel(Connection):
    """A connection that may be closed after the garbage collector has closed it.

    `Connection` keeps its descriptor number then: a second close would close another file that has this number by now.
    """

    def __del__(self) -> None:
        self.close()


class Job(NamedTuple):
    """The input of a supervisor: the maker, the layout of batches, and how many workers to start."""

    maker: Maker
    layout: Layout
    workers: int


class Task(NamedTuple):
    """Rows of a batch that one worker makes."""

    number: int  # of the batch
    slot: int
    rows: range
    before: int = 0  # workers that died while making it


# Messages of a supervisor to the run: ('done', number, bad names), ('died', text), ('failed', error).
Message = tuple[str, Any] | tuple[str, int, list[str]]


def start(fd: int) -> NoReturn:
    """Runs the fork server, which forks a supervisor for each order from a socket.

    An order has two file descriptors, a socket and memory, and the modules that the run has imported for its data. They
    are imported here, once for all supervisors.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps supervisors
    orders = socket.socket(fileno=fd)
    while True:
        fds, modules = _next_order(orders)
        for name in modules:
            with contextlib.suppress(Exception):  # the user of the module reports it
                importlib.import_module(name)
        if os.fork() == 0:
            orders.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _ending(functools.partial(_lead, *fds))
        for each in fds:
            os.close(each)


def _lead(run: int, memory: int) -> None:
    """Runs a supervisor."""
    _Supervisor(Channel(run), memory).run()


def send_order(orders: socket.socket, fds: Sequence[int], modules: Sequence[str]) -> None:
    """Sends an order to the fork server."""
    names = "\n".join(modules).encode()
    socket.send_fds(orders, [struct.pack("!I", len(names))], list(fds))
    orders.sendall(names)


def _next_order(orders: socket.socket) -> tuple[list[int], list[str]]:
    """Returns file descriptors and modules of the next order; ends the process if the run has ended."""
    try:
        head, fds, _, _ = socket.recv_fds(orders, HEAD, 2)
        names, left = b"", struct.unpack("!I", head)[0] if len(head) == HEAD else -1
        while len(names) < left and (part := orders.recv(left - len(names))):
            names += part
    except OSError:
        os._exit(0)
    if len(names) != left:
        os._exit(0)
    return fds, names.decode().split()


def _ending(what: Any) -> NoReturn:
    """Calls a function and ends the process, skipping the interpreter's shutdown."""
    code = 1
    try:
        what()
        code = 0
    except (EOFError, OSError):  # the run, or the supervisor, has ended
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class _Worker:
    """The supervisor's record of a worker."""

    def __init__(self, number: int, pid: int, connection: Channel):
        self.number, self.pid, self.connection = number, pid, connection
        self.tasks: deque[Task] = deque()  # tasks sent to the worker, the current one first


class _Supervisor:
    """Assigns rows to workers, and reports complete batches to the run."""

    def __init__(self, run: Channel, memory_fd: int):
        self._run = run
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # the run has printed which plug-ins are imported
                plugins.load(run.recv())
            self._job: Job = pickle.loads(run.recv_bytes())
        except Exception as error:
            run.send(("failed", _portable(error)))
            raise EOFError from None
        size = self._job.layout.slots * self._job.layout.slot_bytes
        self._memory = mmap.mmap(memory_fd, size)
        os.close(memory_fd)
        self._tasks = self._job.maker.tasks(self._job.workers)
        self._common: deque[Task] = deque()  # for any worker
        self._own: list[deque[Task]] = [deque() for _ in range(self._job.workers)]
        self._left: dict[int, int] = {}  # number of a batch → rows not yet made
        self._bad: dict[int, list[str]] = {}
        self._deaths = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(run, selectors.EVENT_READ, None)
        self._workers: dict[int, _Worker] = {}

    def run(self) -> None:
        """Runs until the run closes its end."""
        for number in range(self._job.workers):
            self._fork(number)
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    self._add(*self._run.recv())
                else:
                    self._hear(key.data)
            for worker in self._workers.values():
                self._give(worker)

    def _fork(self, number: int) -> None:
        ours, theirs = socket.socketpair()
        me, pid = os.getpid(), os.fork()
        if pid == 0:
            ours.close()
            self._run.close()
            for other in self._workers.values():
                other.connection.close()
            self._selector.close()
            _end_with(me)
            connection = Channel(theirs.detach())
            _ending(lambda: _work(connection, self._job.maker, self._views()))
        theirs.close()
        worker = self._workers[number] = _Worker(number, pid, Channel(ours.detach()))
        self._selector.register(worker.connection, selectors.EVENT_READ, worker)

    def _views(self) -> list[Batch]:
        layout = self._job.layout
        return [layout.arrays(self._memory, slot) for slot in range(layout.slots)]

    def _add(self, number: int, slot: int) -> None:
        """Queues the tasks of a batch in a slot."""
        self._left[number], self._bad[number] = sum(len(rows) for _, rows in self._tasks), []
        for who, rows in self._tasks:
            (self._common if who is None else self._own[who]).append(Task(number, slot, rows))

    def _give(self, worker: _Worker) -> None:
        """Sends tasks to a worker, up to AT_ONCE."""
        own = self._own[worker.number]
        while len(worker.tasks) < AT_ONCE and (own or self._common):
            task = (own or self._common).popleft()
            worker.tasks.append(task)
            try:
                worker.connection.send(task)
            except OSError:  # it died: the end of its socket is read next
                return

    def _hear(self, worker: _Worker) -> None:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(worker)
            return
        if kind == "failed":
            self._run.send((kind, value))
            return
        task = worker.tasks.popleft()
        self._bad[task.number] += value
        self._left[task.number] -= len(task.rows)
        if not self._left[task.number]:
            del self._left[task.number]
            self._run.send(("done", task.number, self._bad.pop(task.number)))

    def _replace(self, worker: _Worker) -> None:
        """Replaces a worker that died, and queues its rows again; gives up after repeated deaths."""
        self._selector.unregister(worker.connection)
        worker.connection.close()
        how = _ended(os.waitpid(worker.pid, 0)[1])
        self._deaths += 1
        failed = worker.tasks[0] if worker.tasks else None
        if (failed and failed.before > 1) or self._deaths > MAX_DEATHS:
            where = f", at row {failed.rows.start} of batch {failed.number}" if failed else ""
            self._run.send(("gave up", how, failed and (failed.number, failed.rows.start), where))
            return
        self._run.send(("died", worker.pid, how))
        for place, task in enumerate(reversed(worker.tasks)):
            struck = place == len(worker.tasks) - 1  # the task during which it died
            parts = self._job.maker.again(task.rows) if struck else [task.rows]
            queue = self._common if self._tasks[0][0] is None else self._own[worker.number]
            queue.extendleft(Task(task.number, task.slot, rows, task.before + struck) for rows in reversed(parts))
        del self._workers[worker.number]
        self._fork(worker.number)


def _work(connection: Channel, maker: Maker, views: list[Batch]) -> None:
    """Runs a worker, which makes rows until the supervisor's end is closed."""
    while True:
        task: Task = connection.recv()
        bad: deque[str] = deque()
        try:
            maker.fill(views[task.slot], task.number, task.rows, bad)
        except Exception as error:
            connection.send(("failed", _portable(error)))
        else:
            connection.send(("done", list(bad)))


def _end_with(parent: int) -> None:
    """Makes the kernel kill this process when its parent ends; other systems than Linux rely on the end of the socket.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def _ended(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _portable(error: Exception) -> Exception:
    """Returns a picklable form of the error, with its traceback as a note."""
    if not isinstance(error, UserError):
        error.add_note(f"In a worker process:\n{''.join(traceback.format_exception(error))}")
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
