"""One live line on a terminal, lines of the log elsewhere, and neither in the way of what others write."""

import re
import subprocess
import sys
import time

import jax
import pytest

from mae_jax.runtime import progress
from mae_jax.runtime.progress import Line
from tests.helpers.terminal import on_terminal, screen

BEGIN = """
import logging, signal, sys, time
from mae_jax.commands import cli
from mae_jax.runtime import progress
from mae_jax.runtime.exit import exit_now, write_stderr
progress.TICK, progress.EVERY = 0.02, 0.1
cli.quiet_logs()
log = logging.getLogger("mae_jax.test")
"""
WRITERS = BEGIN + """
with progress.doing("training", total=10, unit="step") as line:
    line.done, line.note = 3, "loss 0.5000"
    time.sleep(0.2)
    print("from print")
    log.info("from the log")
    sys.stdout.write("in two "), sys.stdout.write("halves\\n")
    time.sleep(0.2)
    with progress.doing("saving"):
        time.sleep(0.2)
print("the end")
"""
STUCK = BEGIN + """
import os, threading
def stop():
    time.sleep(0.2)
    write_stderr("stopped: nothing to save")
    time.sleep(0.1)
    exit_now(75)
threading.Thread(target=stop).start()
with progress.doing("compiling"):
    time.sleep(60)
"""
INTERRUPTED = BEGIN + """
with progress.doing("compiling"):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_terminal_shows_a_live_line_and_keeps_the_lines_of_others_whole():
    written, code = on_terminal([sys.executable, "-c", WRITERS])
    assert code == 0
    assert re.search(r"\rtraining 3 of 10 steps +30%\|█+ +\|  loss 0\.5000\x1b\[K", written)
    assert re.search(r"\rsaving  0s\x1b\[K", written)
    assert screen(written) == ["from print", "from the log", "in two halves", "the end", ""]


def test_a_narrow_terminal_gets_lines_that_fit():
    written, _ = on_terminal([sys.executable, "-c", WRITERS], columns=30)
    drawn = re.findall(r"\r([^\r\n\x1b]+)\x1b\[K", written)
    assert drawn
    assert max(map(len, drawn)) < 30
    assert screen(written) == ["from print", "from the log", "in two halves", "the end", ""]


@pytest.mark.parametrize("variable", [{"TERM": "dumb"}, {"CI": "true"}])
def test_a_terminal_that_cannot_or_nobody_watches_gets_plain_lines(variable):
    written, _ = on_terminal([sys.executable, "-c", WRITERS], **variable)
    assert "\x1b" not in written
    assert "training: 3 of 10 steps, loss 0.5000\r\n" in written


def test_a_process_that_ends_at_once_leaves_a_clean_terminal():
    written, code = on_terminal([sys.executable, "-c", STUCK])
    assert code == 75
    assert "compiling  0s" in written
    assert screen(written) == ["stopped: nothing to save", ""]


def test_an_interrupt_leaves_a_clean_terminal():
    written, code = on_terminal([sys.executable, "-c", INTERRUPTED], interrupt_at="ready")
    assert code != 0
    assert not any("compiling  " in line for line in screen(written))


def test_a_file_gets_a_line_now_and_then_and_nothing_else():
    done = subprocess.run([sys.executable, "-c", WRITERS], capture_output=True, text=True, timeout=60)
    assert done.stdout == "from print\nin two halves\nthe end\n"
    lines = done.stderr.splitlines()
    assert "training: 3 of 10 steps, loss 0.5000" in lines
    assert "saving, 0s" in lines
    assert set(lines) == {"training: 3 of 10 steps, loss 0.5000", "saving, 0s", "from the log"}


def test_closed_streams_are_no_mistake():
    code = BEGIN + "with progress.doing('compiling'): time.sleep(0.1)"
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, code], timeout=60)
    assert done.returncode == 0


def test_lines_say_how_fast_it_goes_and_what_is_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    line = Line("embedding", total=1000, done=200)
    assert line.plain() == "embedding: 200 of 1,000 images, 0s"
    line.advance(300)
    now[0] += 10
    assert line.plain() == "embedding: 500 of 1,000 images, 30.0 images/s, 16s left"
    assert line.drawn(120, ascii_only=True) == \
        "embedding 500 of 1,000 images   50%|##########          |  30.0 images/s, 16s left"
    uncounted = Line("evaluating {knn}")
    now[0] += 61
    assert uncounted.drawn(120, ascii_only=True) == "evaluating {knn}  1m01s"


def test_a_quiet_line_is_not_logged_and_what_ends_first_need_not_have_begun_last(monkeypatch, caplog):
    monkeypatch.setattr(progress, "TICK", 0.01)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    caplog.set_level("INFO", logger="mae_jax")
    with progress.doing("training", total=3, unit="step", logged=False):
        outer = progress.doing("drawing")
        outer.__enter__()
        with progress.doing("evaluating"):
            progress.advance(7)
            time.sleep(0.1)
            outer.__exit__(None, None, None)
            time.sleep(0.1)
    assert "training" not in caplog.text
    assert "drawing" not in caplog.text
    assert "evaluating: 7 images, 0s" in caplog.text
    assert not progress._display.lines


def test_one_of_several_processes_shows_it(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for number in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        with progress.doing("compiling") as line:
            assert (line in progress._display.lines) == (number == 0)
