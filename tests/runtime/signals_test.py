"""A signal saves and stops, or stops at once when nothing is lost: shown on real processes."""

import signal
import subprocess
import sys
import time

import pytest

from mae_jax.runtime.signals import SignalHandler

PROLOGUE = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's would be inherited
import jax, jax.numpy as jnp
from mae_jax.runtime.signals import SignalHandler

def tell(word):
    print(word, flush=True)

def compile_for_long():
    def wide(x):  # 200 sorts: seconds inside XLA
        return [jnp.sort(x[:i + 2] * i) @ x[:i + 2] for i in range(200)]
    lowered = jax.jit(wide).lower(jnp.ones(2000))
    tell("compiling")
    lowered.compile()
    tell("compiled")
"""


def start(body: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PROLOGUE + body], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def wait_for(process: subprocess.Popen, word: str) -> None:
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"ended before {word!r}: {process.stderr.read()}")


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_compilation_before_the_first_step_ends_at_once_with_75(number):
    process = start("with SignalHandler():\n    compile_for_long()")
    wait_for(process, "compiling")
    time.sleep(0.5)  # inside XLA
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, "compiled" in out) == (75, False), err
    assert err.strip() == "stopped: nothing to save; the same command resumes from here"


LOOP = """
with SignalHandler() as stopper:
    for step in range(10_000):
        time.sleep(0.01)
        stopper.mark_unsaved()
        if step == 3:
            tell("running")
        if stopper.should_stop(step):
            tell("saving")
            {save}
            stopper.mark_saved()
            sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, *(
    pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGHUP))])
def test_a_signal_between_steps_lets_the_loop_save(number):
    process = start(LOOP.format(save="tell('saved')"))
    wait_for(process, "running")
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, out.split()) == (75, ["saving", "saved"])
    assert err.count("stopping: saving after this step") == 1


@pytest.mark.slow
def test_nohup_is_left_alone():
    process = start("import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + LOOP.format(save="pass"))
    wait_for(process, "running")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75


@pytest.mark.slow
def test_a_second_ctrl_c_quits_at_once(tmp_path):
    process = start(LOOP.format(save="time.sleep(60)"))
    wait_for(process, "running")
    process.send_signal(signal.SIGINT)
    wait_for(process, "saving")
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


@pytest.mark.slow
def test_a_second_sigterm_changes_nothing():
    process = start(LOOP.format(save="tell('saved')"))
    wait_for(process, "running")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert (code, "saved" in out, err.count("stopping")) == (75, True, 1)


@pytest.mark.slow
def test_a_signal_after_everything_is_saved_ends_at_once():
    process = start("""
with SignalHandler() as stopper:
    stopper.mark_unsaved()
    stopper.mark_saved()
    tell("running")
    time.sleep(60)
""")
    wait_for(process, "running")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75


@pytest.mark.slow
def test_a_signal_in_an_evaluation_ends_at_once_since_the_state_was_saved_before(tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "tests.faults.hang", "evaluation", str(tmp_path / "run"), "600"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(process, "hangs")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert (code, "stopped: nothing to save; the same command resumes" in err) == (75, True), err
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


def test_handlers_are_as_before_after_exit():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with SignalHandler() as stopper:
        assert signal.getsignal(signal.SIGTERM) is not before[1]
        assert not stopper.should_stop(0)
    assert [signal.getsignal(number) for number in numbers] == before
    descriptor = signal.set_wakeup_fd(-1)
    assert descriptor == -1
