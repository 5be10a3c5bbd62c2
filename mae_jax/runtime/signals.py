"""Stopping on a signal: after SIGTERM, SIGHUP or Ctrl-C, a run saves the current step, or ends at once if it is saved.

Python runs signal handlers between bytecodes of the main thread, and therefore not while XLA compiles, which can take
minutes. So the handlers here do nothing, and a daemon thread reads the signal numbers, which CPython's C handler writes
to `signal.set_wakeup_fd`.
"""

import os
import signal
import threading
from types import TracebackType
from typing import Protocol

from mae_jax.errors import STOPPED
from mae_jax.runtime import peers
from mae_jax.runtime.exit import ending_signals, exit_now, write_stderr

QUIT = 130  # exit code 128 + SIGINT, as shells report it


class Stopper(Protocol):
    """Decides after each step whether the loop saves and stops."""

    def mark_unsaved(self) -> None:
        """Records that the state after the last step is not on disk yet."""

    def mark_saved(self) -> None:
        """Records that the current state is committed on disk."""

    def should_stop(self, step: int) -> bool:
        """Returns whether to save and stop after `step`."""


class NoSignals:
    """A Stopper that never stops a run, for a process that handles its signals itself."""

    def mark_unsaved(self) -> None:
        """See `Stopper`."""

    def mark_saved(self) -> None:
        """See `Stopper`."""

    def should_stop(self, step: int) -> bool:
        """See `Stopper`."""
        return False


class SignalHandler:
    """Context manager that turns `ending_signals` into a request to save and stop; enter it in the main thread.

    With several processes, a signal to one of them stops all: after the same step, or at once.

    Attributes:
      requested: True after the first signal to this process; the loop then saves and exits with `STOPPED`.
    """

    def __init__(self) -> None:
        self.requested = False
        self._unsaved = False
        self._interrupts = 0

    def mark_unsaved(self) -> None:
        """See `Stopper`."""
        self._unsaved = True

    def mark_saved(self) -> None:
        """See `Stopper`."""
        self._unsaved = False

    def should_stop(self, step: int) -> bool:
        """Returns whether to save and stop after `step`; all processes get the same answer."""
        return self._peers.should_stop(step) if self._peers else self.requested

    def __enter__(self) -> "SignalHandler":
        self._peers = peers.peers()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._watch, name="stopper", daemon=True)
        self._signals = ending_signals()
        self._thread.start()
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in self._signals}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._write)  # ends the thread's read
        self._thread.join()
        os.close(self._read)

    def _watch(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] in self._signals:
                self._signalled(number[0])

    def _signalled(self, number: int) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._leave("stopped at once: steps since the last save are lost", QUIT)
        elif not self._unsaved:
            self._leave("stopped: nothing to save; the same command resumes from here", STOPPED)
        elif not self.requested:
            self.requested = True
            write_stderr("stopping: saving after this step; press Ctrl-C "
                         f"{'again' if self._interrupts else 'twice'} to quit at once")
            if self._peers:
                self._peers.request_stop()

    def _leave(self, line: str, code: int) -> None:
        write_stderr(line)
        if self._peers:
            self._peers.leave(code, line)
        exit_now(code)  # the main thread may be in a compilation, which no exception can interrupt
