"""What is said while something long runs, to a file and to a terminal."""

import os
import pty
import re
import subprocess
import sys

CODE = """
import time
from mae_jax.commands.plan.progress import progress
with progress("compiling", every=0.2):
    time.sleep({seconds})
"""


def test_a_file_gets_a_line_at_once_and_another_now_and_then():
    done = subprocess.run([sys.executable, "-c", CODE.format(seconds=0.5)], capture_output=True, text=True, timeout=60)
    lines = done.stderr.splitlines()
    assert lines[0] == "compiling"
    assert set(lines[1:]) == {"compiling, 0s"}
    assert done.stdout == ""


def test_a_terminal_gets_one_line_that_counts():
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", CODE.format(seconds=1.5)], stdout=subprocess.PIPE, stderr=theirs, timeout=60,
                   check=True)
    os.close(theirs)
    text = os.read(ours, 1000).decode()
    os.close(ours)
    assert re.fullmatch(r"\rcompiling(\rcompiling, \ds){2,}\r\n", text)


def test_a_closed_standard_error_is_no_mistake():
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, CODE.format(seconds=0)], timeout=60)
    assert done.returncode == 0
