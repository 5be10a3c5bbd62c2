import signal
import subprocess
import sys

import pytest

ENDING = """
import os, signal
from mae_jax.runtime.exit import exit_process

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started this may ignore it

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGINT):
        print("late", flush=True)
        kill(process, number)  # when Python has given the signal its default action

late = Late()
exit_process({code})
"""


@pytest.mark.parametrize("code", [0, 3])
def test_ctrl_c_while_python_ends_does_not_change_the_exit_code(code):
    ended = subprocess.run([sys.executable, "-c", ENDING.format(code=code)], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "late\n", "")
    killed = ENDING.replace("exit_process({code})", "raise SystemExit(0)")
    assert subprocess.run([sys.executable, "-c", killed], timeout=60).returncode == -signal.SIGINT
