"""A terminal that a program writes to, and what is then to be seen on it."""

import os
import pty
import re
import select
import signal
import subprocess
import termios
import time


def on_terminal(command: list[str], columns: int = 80, interrupt_at: str = "", seconds: float = 60, **environ: str
                ) -> tuple[str, int]:
    """Runs a program on a terminal of its own; returns all that was written to it, and the exit code.

    Args:
      command: of the program.
      columns: of the terminal.
      interrupt_at: the text after which Ctrl-C is pressed, once.
      seconds: for all of it.
      environ: variables beside those of this process, without TERM and CI.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    clean = {name: value for name, value in os.environ.items() if name not in ("CI", "TERM")}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                               env={**clean, "TERM": "xterm", **environ})
    os.close(theirs)
    text, deadline = b"", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.5)[0]:
            try:
                text += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        if interrupt_at and interrupt_at.encode() in text:
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            interrupt_at = ""
    os.close(ours)
    return text.decode(), process.wait(timeout=seconds)


def screen(written: str) -> list[str]:
    """Returns the lines that a terminal shows after all that was written."""
    lines, column = [""], 0
    for token in re.findall(r"\x1b\[K|\r|\n|[^\r\n\x1b]+", written):
        if token == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif token == "\r":
            column = 0
        elif token == "\n":
            lines.append("")
        else:
            lines[-1] = lines[-1][:column] + token + lines[-1][column + len(token):]
            column += len(token)
    return lines
