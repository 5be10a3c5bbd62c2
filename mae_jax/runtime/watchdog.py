"""Ends a run that hangs: a step, a save, the input or an evaluation that takes too long, with all stacks on record."""

import sys
import threading
import time
from types import FrameType, TracebackType

import jax
from etils import epath

from mae_jax import errors
from mae_jax.runtime import peers as runtime_peers
from mae_jax.runtime.exit import exit_now, write_stderr

TICK = 0.5  # seconds between two looks
WRITING = 10.0  # seconds for the stacks to be written to the workdir, which may be what hangs

_running: "Watchdog | None" = None


def heartbeat() -> None:
    """Says that what takes long gets on; called for each batch of an evaluation."""
    if _running:
        _running.turn += 1


class Watchdog:
    """Context manager with a thread that ends the process, with exit code 3, when one thing takes too long.

    Time is counted by the thread's own ticks: while the whole process is frozen (SIGSTOP, Ctrl-Z), none
    passes. A main thread that holds Python's lock for ever is not noticed.

    Attributes:
      turn: changes whenever something begins or gets on.
    """

    def __init__(self, seconds: float, workdir: epath.Path):
        """Watches nothing before `on` is called, and nothing at all where `seconds` is 0."""
        self.seconds, self.workdir = seconds, workdir
        self.turn, self._doing = 0, ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def watch(self, doing: str) -> None:
        """Says what begins now, as 'the input of step 7'; '' stops watching."""
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
        line = (f"stopped: {doing} took more than guard.stall_seconds={self.seconds:g}; what every thread was doing: "
                f"{file}")
        write_stderr(line)
        if peers := runtime_peers.peers():
            peers.leave(errors.GUARD, line)
        exit_now(errors.GUARD)


def _stacks() -> str:
    """Returns what all threads are doing; touches no file, since a disk may be what hangs."""
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
    """Writes the stacks to the workdir, or to the screen where that fails."""
    try:
        file.write_text(text)
    except Exception as error:
        write_stderr(f"cannot write {file}: {error}\n{text}")
