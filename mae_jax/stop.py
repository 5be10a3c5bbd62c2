"""Stopping on a signal: SIGTERM and Ctrl-C save at the current step, or end the process at once when nothing is lost.

Python runs signal handlers between bytecodes of the main thread, hence never while XLA compiles, which can take
minutes. So the handlers here do nothing, and a daemon thread reads the bytes that CPython's C handler writes to
`signal.set_wakeup_fd`.
"""

import os
import signal
import threading
from types import TracebackType

import jax
from jax.experimental import multihost_utils

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
QUIT = 130  # 128 + SIGINT, as shells report it


class Stopper:
    """Context manager that turns SIGTERM and SIGINT into a request to save and stop. Enter it in the main thread.

    With several processes JAX's own SIGTERM handler stays, because its notice is what makes all processes stop at the
    same step; Ctrl-C in one of them is passed on to it.

    Attributes:
      requested: set by the first signal; the loop saves and exits with `STOPPED`.
    """

    def __init__(self) -> None:
        self.requested = False
        self._unsaved = False
        self._interrupts = 0

    def stepped(self) -> None:
        """The loop says: a step was taken, its result is not on disk yet."""
        self._unsaved = True

    def saved(self) -> None:
        """The loop says: the state as of now is committed on disk."""
        self._unsaved = False

    def should_stop(self, step: int) -> bool:
        """Tells whether to save and stop after `step`; with several processes all get the same answer."""
        if self._distributed:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def __enter__(self) -> "Stopper":
        self._distributed = jax.process_count() > 1
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._watch, name="stopper", daemon=True)
        self._thread.start()
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        caught = (signal.SIGINT,) if self._distributed else (signal.SIGINT, signal.SIGTERM)
        self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in caught}
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
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                self._signalled(number[0])

    def _signalled(self, number: int) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            _leave("stopped at once: steps since the last save are lost", QUIT)
        elif self._distributed:
            if number == signal.SIGINT:
                _say("stopping: all processes save at the same step; press Ctrl-C again to quit at once")
                os.kill(os.getpid(), signal.SIGTERM)
        elif not self._unsaved:
            _leave("stopped: nothing to save, the same command goes on from here", STOPPED)
        else:
            if not self.requested:
                _say("stopping: saving after this step; press Ctrl-C "
                     f"{'again' if self._interrupts else 'twice'} to quit at once")
            self.requested = True


def _say(line: str) -> None:
    # Straight to the file descriptor: the main thread may hold the lock of sys.stderr. The first line break ends a
    # progress line.
    os.write(2, f"\n{line}\n".encode())


def _leave(line: str, code: int) -> None:
    _say(line)
    os._exit(code)  # the main thread may be inside a compilation that no exception can interrupt
