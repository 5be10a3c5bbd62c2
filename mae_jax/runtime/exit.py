"""How a process ends: in order from its main thread, or at once from any."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

try:
    _STDERR = os.dup(2)  # as it is now: later it points to nowhere for a while (data/tensorflow_cpu.py)
except OSError:  # it was closed before Python began
    _STDERR = os.open(os.devnull, os.O_WRONLY)


def write_stderr(line: str) -> None:
    """Writes a line to standard error past Python's locks, which the main thread may hold, from any thread.

    On a terminal it takes the place of a progress line (progress.py), and of the "^C" behind it.
    """
    with contextlib.suppress(OSError):
        start = "\r\x1b[K" if os.isatty(_STDERR) and os.environ.get("TERM") != "dumb" else "\n"
        os.write(_STDERR, f"{start}{line}\n".encode())


def ending_signals() -> list[int]:
    """Returns the signals that end a run in order: not SIGHUP where `nohup` has it ignored."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *[signal.SIGHUP] * hangs_up]


_busy = False


def wait_for_no_thread() -> None:
    """Says that threads may be busy for long with what was given up: the process ends without waiting for them."""
    global _busy
    _busy = True


def exit_process(code: int) -> NoReturn:
    """Ends the process in order, from its main thread. Its command is over: Ctrl-C no longer changes the exit code.

    Python gives Ctrl-C its default action while it ends, which takes a while: a finished run would seem to be killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _busy:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the disk that the save was given up for may be that of the output
                stream.flush()
        exit_now(code)
    sys.exit(code)


_last: list[Callable[[], None]] = []


@contextlib.contextmanager
def on_forced_exit(action: Callable[[], None]) -> Iterator[None]:
    """Has something done, which takes seconds at most, where `exit_now` ends the process meanwhile."""
    _last.append(action)
    try:
        yield
    finally:
        _last.remove(action)


def exit_now(code: int) -> NoReturn:
    """Ends the process at once, from any thread, whatever the main thread is doing."""
    for action in list(_last):
        with contextlib.suppress(Exception):
            action()
    os._exit(code)
