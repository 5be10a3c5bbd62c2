"""Ends a run whose step, save, input or evaluation hangs, and writes the stacks of all threads."""

import sys
import threading
import time
from types import FrameType, TracebackType

import jax
from etils import epath

from mae_jax import errors
from mae_jax.runtime import peers as runtime_peers
from mae_jax.runtime.exit import exit_now, write_stderr

TICK = 0.5  # seconds between checks
WRITING = 10.0  # timeout for writing the stacks to the workdir, whose disk may be what hangs

_running: "Watchdog | None" = None


def heartbeat() -> None:
    """Reports progress of a long operation, such as after each batch of an evaluation."""
    if _running:
        _running.turn += 1


class Watchdog:
    """Context manager with a thread that ends the process, with exit code 3, if an operation makes no progress.

    Time is counted by the thread's own ticks, so that no time passes while the process is frozen (SIGSTOP, Ctrl-Z). A
    main thread that never releases Python's global lock is not detected.

    Attributes:
      turn: counter of beginnings and of `heartbeat` calls.
    """

    def __init__(self, seconds: float, workdir: epath.Path):
        """Creates the watchdog.

        Args:
          seconds: timeout of an operation without progress; 0: none.
          workdir: where the stacks are written.
        """
        self.seconds, self.workdir = seconds, workdir
        self.turn, self._doing = 0, ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def watch(self, doing: str) -> None:
        """Starts the timeout of an operation, named such as 'the input of step 7'; '' stops it."""
        self._doing = doing
        self.turn += 1

    def __enter__(self) -> "Watchdog":
        global _running
        _running = self
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _running
        _running = None
        self._end.set()
        if self.seconds:
            self._thread.join()

    def _watch(self) -> None:
        turn, spent, before = self.turn, 0.0, time.monotonic()
        while not self._end.wait(min(TICK, self.seconds / 4)):
            now = time.monotonic()
            spent = spent + min(now - before, 2 * TICK) if turn == self.turn else 0.0
            turn, before = self.turn, now
            if self._doing and spent > self.seconds:
                self._leave(self._doing)

    def _leave(self, doing: str) -> None:
        file = self.workdir / f"stacks_{jax.process_index()}.txt"
        writer = threading.Thread(target=_write, args=(file, _stacks()), daemon=True)
        writer.start()
        writer.join(WRITING)
        line = f"stopped: {doing} took more than guard.stall_seconds={self.seconds:g}; stacks of all threads: {file}"
        write_stderr(line)
        if peers := runtime_peers.peers():
            peers.leave(errors.GUARD, line)
        exit_now(errors.GUARD)


def _stacks() -> str:
    """Returns the stacks of all threads; reads no source files, since a disk may be what hangs."""
    names, lines = {thread.ident: thread.name for thread in threading.enumerate()}, []
    for number, newest in sys._current_frames().items():
        frame: FrameType | None = newest
        lines.append(f"\nThread {names.get(number, number)} (most recent call first):")
        while frame:
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_qualname}')
            frame = frame.f_back
    return "\n".join(lines).lstrip() + "\n"


def _write(file: epath.Path, text: str) -> None:
    """Writes the stacks to the workdir, or to standard error if that fails."""
    try:
        file.write_text(text)
    except Exception as error:
        write_stderr(f"cannot write {file}: {error}\n{text}")
