"""What is said while a compiler runs: on a terminal a line that counts the seconds, else a line now and then."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator

from mae_jax.runtime.console import clock

EVERY = 60.0  # seconds between two lines, where they go to a file


@contextlib.contextmanager
def progress(text: str, every: float = EVERY) -> Iterator[None]:
    """Writes `text` to standard error, and goes on saying for how long, until the block has ended.

    Args:
      text: what is being done.
      every: seconds between two lines that are not on a terminal.
    """
    try:
        descriptor = os.dup(2)  # which may be silenced meanwhile
    except OSError:  # standard error is closed
        yield
        return
    terminal, began, done = os.isatty(descriptor), time.monotonic(), threading.Event()

    def write(line: str, end: str = "\n") -> None:
        with contextlib.suppress(OSError):
            os.write(descriptor, (("\r" if terminal else "") + line + end).encode())

    def passed() -> str:
        return f"{text}, {clock(time.monotonic() - began)}"

    def watch() -> None:
        while not done.wait(1.0 if terminal else every):
            write(passed(), "" if terminal else "\n")

    write(text, "" if terminal else "\n")
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        if terminal:
            write(passed())
        os.close(descriptor)
