"""Progress of a command: a live line below the other output on a terminal, otherwise a log line every 30 seconds.

  with progress.doing("compiling the train step"):
      ...
  with progress.doing("embedding", total=1000, unit="image") as line:
      line.advance(32)

A thread draws the line, so that it stays live while XLA compiles, and costs a training step only a few assignments. The
innermost `doing` is shown.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol, TextIO

from mae_jax.runtime.console import clock
from mae_jax.runtime.exit import on_forced_exit

EVERY = 30.0  # seconds between two log lines
TICK = 0.25  # seconds between updates, and before a line is first drawn, so that short work does not flicker
BAR = 20  # characters
ERASE = "\x1b[K"  # escape sequence: erase from the cursor to the end of the line

logger = logging.getLogger(__name__)


class Tell(Protocol):
    """A callback for progress: takes the number of newly finished units."""

    def __call__(self, count: int = 1, /) -> object: ...


class Line:
    """The progress of one activity.

    Attributes:
      done: number of finished units; the caller may set it.
      note: text in place of speed and remaining time.
    """

    def __init__(self, text: str = "", total: int = 0, done: int = 0, unit: str = "image", logged: bool = True):
        """Starts the clock; arguments as for `doing`."""
        self.text, self.total, self.done, self.unit, self.logged = text, total, done, unit, logged
        self.note = ""
        self._first = done
        self._began = self._said = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """Adds `count` finished units."""
        self.done += count

    def is_due(self, every: float) -> bool:
        """Returns whether `every` seconds have passed since the last log line; if so, restarts this interval."""
        now = time.monotonic()
        due = self.logged and now >= self._said + every
        self._said = now if due else self._said
        return due

    def plain(self) -> str:
        """Returns the text of a log line."""
        counted = f": {self._count()}" if self.total or self.done else ""
        return f"{self.text}{counted}, {self._rest()}"

    def drawn(self, width: int, ascii_only: bool) -> str:
        """Returns the text of the live line for a terminal of `width` columns."""
        from tqdm import tqdm

        count = self._count() if self.total or self.done else ""
        left, right = (part.replace("{", "{{").replace("}", "}}") for part in (
            f"{self.text} {count}".rstrip(), self._rest()))
        bar = f"{{percentage:3.0f}}%|{{bar:{BAR}}}|" if self.total else ""
        return tqdm.format_meter(min(self.done, self.total or self.done), self.total or None, 0.0, ncols=width,
                                 ascii=ascii_only, bar_format=f"{left}  {bar}{'  ' if bar else ''}{right}")

    def _count(self) -> str:
        units = self.unit if self.total == 1 else f"{self.unit}s"
        return f"{self.done:,} of {self.total:,} {units}" if self.total else f"{self.done:,} {units}"

    def _rest(self) -> str:
        """Returns the note; without one, speed and remaining time, or the elapsed time if these are not known."""
        passed = time.monotonic() - self._began
        if self.note:
            return self.note
        speed = (self.done - self._first) / max(passed, 1e-9)
        if not self.total or not speed:
            return clock(passed)
        return f"{speed:.1f} {self.unit}s/s, {clock(max(self.total - self.done, 0) / speed)} left"


class _Display:
    """The stack of active lines, and the thread that shows the innermost."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.silent = False  # permanently, once the process is ending
        self._lock = threading.RLock()
        self._terminal: TextIO | None = None
        self._drawn = False
        self._end = threading.Event()
        self._closing = contextlib.ExitStack()

    def add(self, line: Line) -> None:
        with self._lock:
            self.lines.append(line)
            if len(self.lines) == 1:
                self._open()

    def remove(self, line: Line) -> None:
        with self._lock:
            self.lines.remove(line)
            if not self.lines:
                self._end.set()
                self._erase()
                self._closing.close()

    @contextlib.contextmanager
    def erased(self) -> Iterator[None]:
        """Erases the live line while other output is written, and draws it again."""
        with self._lock:
            was_drawn = self._drawn
            self._erase()
            try:
                yield
            finally:
                if was_drawn:
                    self._draw()

    def abandon(self) -> None:
        """Erases the line before the process exits at once; may be called from any thread, even if the lock is held."""
        self.silent = True
        if self._lock.acquire(timeout=0.2):
            self._erase(whatever=True)
            self._lock.release()

    def _open(self) -> None:
        self._end = end = threading.Event()
        self._terminal = _terminal()
        if self._terminal:
            self._closing.callback(self._close_terminal)
            self._closing.enter_context(on_forced_exit(self.abandon))
            for name in ("stdout", "stderr"):
                self._closing.callback(_Above.put(self, name))
        threading.Thread(target=self._watch, args=(end,), name="progress", daemon=True).start()

    def _close_terminal(self) -> None:
        if self._terminal:
            with contextlib.suppress(OSError):
                self._terminal.close()
            self._terminal = None

    def _watch(self, end: threading.Event) -> None:
        while not end.wait(TICK):
            with self._lock:
                if end.is_set() or self.silent:
                    return
                if self._terminal:
                    self._draw()
                    continue
                line = self.lines[-1]
                text = line.plain() if line.is_due(EVERY) else ""
            if text:  # logged without our lock: other threads take it while they hold a lock of logging
                logger.info("%s", text)

    def _draw(self) -> None:
        if not self._terminal or self.silent or not self.lines:
            return
        try:
            width = os.get_terminal_size(self._terminal.fileno()).columns or 80
            ascii_only = "utf" not in (self._terminal.encoding or "").lower()
            self._terminal.write(f"\r{self.lines[-1].drawn(width - 1, ascii_only)}{ERASE}")
            self._terminal.flush()
            self._drawn = True
        except (OSError, ValueError):  # the terminal is gone; the run continues
            self._terminal = None

    def _erase(self, whatever: bool = False) -> None:
        if self._terminal and (self._drawn or whatever):
            with contextlib.suppress(OSError, ValueError):
                self._terminal.write(f"\r{ERASE}")
                self._terminal.flush()
        self._drawn = False


class _Above:
    """Replaces standard output or error while a line is live, and writes complete lines above it."""

    def __init__(self, display: _Display, stream: TextIO):
        self._display, self._stream, self._waiting = display, stream, ""

    @classmethod
    def put(cls, display: _Display, name: str) -> Any:
        """Replaces `sys.stdout` or `sys.stderr`; returns a function that restores it."""
        above = cls(display, getattr(sys, name))
        setattr(sys, name, above)

        def give_back() -> None:
            above._write(above._waiting)
            if getattr(sys, name) is above:
                setattr(sys, name, above._stream)

        return give_back

    def write(self, text: str) -> int:
        with self._display.erased() if "\n" in text else contextlib.nullcontext():
            lines, newline, rest = (self._waiting + text).rpartition("\n")
            self._waiting = rest
            self._write(lines + newline)
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def _write(self, text: str) -> None:
        if text:
            self._stream.write(text)
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_display = _Display()


@contextlib.contextmanager
def doing(text: str, total: int = 0, done: int = 0, unit: str = "image", logged: bool = True) -> Iterator[Line]:
    """Shows progress until the block ends.

    On a terminal this is a live line, with a bar if `total` is given and with the elapsed time otherwise. Elsewhere it
    is a log line every EVERY seconds. With several processes, only process 0 shows it.

    Args:
      text: the activity, as "compiling the train step".
      total: number of units; 0: not known.
      done: number of units that were finished before.
      unit: singular name of a unit.
      logged: False: no log lines, for activities that log their own.
    """
    line = Line(text, total, done, unit, logged)
    if not _is_first():
        yield line
        return
    _display.add(line)
    try:
        yield line
    finally:
        _display.remove(line)


def _is_first() -> bool:
    """Returns whether this is process 0; True without jax.distributed."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def advance(count: int) -> None:
    """Adds `count` finished units to the innermost line, if that has no total."""
    if _display.lines and not _display.lines[-1].total:
        _display.lines[-1].advance(count)


def above(stream: TextIO) -> Any:
    """Returns a stream that writes complete lines to `stream`, above the live line if there is one."""
    return _Above(_display, stream)


def _terminal() -> TextIO | None:
    """Returns the terminal to draw on; None if output goes to a file, a pipe, a notebook, a CI or a dumb terminal."""
    if os.environ.get("TERM") == "dumb" or os.environ.get("CI"):
        return None
    try:
        if not (sys.stdout.isatty() and sys.stderr.isatty()):
            return None
        # A duplicate, since descriptor 2 is redirected while C++ libraries are silenced.
        return open(os.dup(sys.stderr.fileno()), "w", errors="replace")
    except (AttributeError, OSError, ValueError):  # a stream is closed, or is not a file
        return None
