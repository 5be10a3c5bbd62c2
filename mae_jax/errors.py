"""How a run ends early on purpose, and the words that go with it."""

import contextlib
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend. Its text is the one line that is printed; the exit code is 2."""


class GuardError(Exception):
    """A guard stopped the run (non-finite gradients, too many bad pictures). The exit code is 3."""


_STDERR = os.dup(2)  # as it is now: later it points to nowhere for a while (data/tensorflow_cpu.py)


def say_now(line: str) -> None:
    """Writes a line to standard error past Python's locks, which the main thread may hold, from any thread.

    The first line break ends a progress line.
    """
    with contextlib.suppress(OSError):
        os.write(_STDERR, f"\n{line}\n".encode())


def ending_signals() -> list[int]:
    """Returns the signals that end a run in order: not SIGHUP where `nohup` has it ignored."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *[signal.SIGHUP] * hangs_up]


_busy = False


def wait_for_no_thread() -> None:
    """Says that threads may be busy for long with what was given up: the process ends without waiting for them."""
    global _busy
    _busy = True


def leave(code: int) -> NoReturn:
    """Ends the process in order, from its main thread."""
    if _busy:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the disk that the save was given up for may be that of the output
                stream.flush()
        quit_now(code)
    sys.exit(code)


_last: list[Callable[[], None]] = []


@contextlib.contextmanager
def at_the_last(action: Callable[[], None]) -> Iterator[None]:
    """Has something done, which takes seconds at most, where `quit_now` ends the process meanwhile."""
    _last.append(action)
    try:
        yield
    finally:
        _last.remove(action)


def quit_now(code: int) -> NoReturn:
    """Ends the process at once, from any thread, whatever the main thread is doing."""
    for action in list(_last):
        with contextlib.suppress(Exception):
            action()
    os._exit(code)


def printable(text: str) -> str:
    """Returns a name from data as one line that any terminal shows: what is no printable character as its escape."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def counted(count: int, what: str) -> str:
    """Returns '1 picture', '2 pictures'."""
    return f"{count} {what}{'s' * (count != 1)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns the end of an error line: the nearest known name, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known) if known else 'none'}"


def cause(error: BaseException) -> str:
    """Returns the first error of a chain in one line, without the specs that TensorStore appends."""
    while error.__cause__:
        error = error.__cause__
    specs = r" \[\w+(?:\[\d+\])?=|\. See full TensorStore|\. Tensorstore KvStore"
    text = re.split(specs, " ".join(str(error).split()))[0]
    return f"{type(error).__name__}: {text[:600]}"
