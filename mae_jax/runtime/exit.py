"""Exit of the process: an orderly one from the main thread, or an immediate one from any thread."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

try:
    _STDERR = os.dup(2)  # a copy: data/tensorflow_cpu.py redirects descriptor 2 for a while
except OSError:  # descriptor 2 was closed before Python started
    _STDERR = os.open(os.devnull, os.O_WRONLY)


def write_stderr(line: str) -> None:
    """Writes a line to standard error without Python's locks, which the main thread may hold; for any thread.

    On a terminal, the line overwrites a progress line (progress.py) and the "^C" after it.
    """
    with contextlib.suppress(OSError):
        start = "\r\x1b[K" if os.isatty(_STDERR) and os.environ.get("TERM") != "dumb" else "\n"
        os.write(_STDERR, f"{start}{line}\n".encode())


def ending_signals() -> list[int]:
    """Returns the signals that end a run in order: SIGTERM, SIGINT and SIGHUP, unless `nohup` ignores the last."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *[signal.SIGHUP] * hangs_up]


_busy = False


def wait_for_no_thread() -> None:
    """Marks that abandoned IO threads may still run, so that `exit_process` does not join them."""
    global _busy
    _busy = True


def exit_process(code: int) -> NoReturn:
    """Ends the process in order, from its main thread, when its command is done.

    From here on Ctrl-C is ignored. Python restores its default action during the interpreter's shutdown, and a finished
    run would look killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _busy:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the output may be on the same failing disk as the abandoned save
                stream.flush()
        exit_now(code)
    sys.exit(code)


_last: list[Callable[[], None]] = []


@contextlib.contextmanager
def on_forced_exit(action: Callable[[], None]) -> Iterator[None]:
    """Context in which `exit_now` first runs `action`, which must take at most seconds."""
    _last.append(action)
    try:
        yield
    finally:
        _last.remove(action)


def exit_now(code: int) -> NoReturn:
    """Ends the process immediately, from any thread, after the actions of `on_forced_exit`."""
    for action in list(_last):
        with contextlib.suppress(Exception):
            action()
    os._exit(code)
