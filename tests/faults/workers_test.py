"""Worker processes that make examples: what befalls them, the run, and the memory that they share."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults import processes
from tests.helpers.process_tree import alive, children, descendants

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FIELDS = {"data.source": "photo_crops", "data.path": "", "data.workers": "2", "pause": 0.1}
GONE = 5.0  # seconds in which no process is left
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def golden(tmp_path_factory, cache) -> Path:
    """A run whose examples threads made, and that nothing disturbed."""
    folder = tmp_path_factory.mktemp("golden") / "run"
    processes.finish(folder, cache, processes=1, devices=1, fields={**FIELDS, "data.workers": "0", "pause": 0.0})
    return folder


def started(folder: Path, cache: Path, steps: int) -> subprocess.Popen:
    """Starts a run with two workers; returns when it has drawn so many batches more."""
    run, = processes.start(folder, cache, processes=1, devices=1, fields=FIELDS)
    goes_on(run, folder, steps)
    return run


def goes_on(run: subprocess.Popen, folder: Path, steps: int) -> None:
    """Waits until a run has drawn so many batches more."""
    before = drawn(folder)
    deadline = time.monotonic() + 120
    while drawn(folder) < before + steps and run.poll() is None:
        assert time.monotonic() < deadline, processes.output(folder, 0)
        time.sleep(0.02)
    assert run.poll() is None, processes.output(folder, 0)


def drawn(folder: Path) -> int:
    file = Path(f"{folder}.ids.-1")
    return file.read_text().count(f" {processes.peer.END}\n") if file.exists() else 0


def supervisor_of(run: subprocess.Popen) -> int:
    """Returns the process id of the supervisor: the fork server's child."""
    server, = [child for child in children(run.pid) if "worker_process" in Path(f"/proc/{child}/cmdline").read_text()]
    return children(server)[-1]


def left(pids: list[int]) -> list[int]:
    """Returns which processes still run after the time in which all must have ended."""
    deadline = time.monotonic() + GONE
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if alive(pid)]


def test_workers_that_are_killed_and_ctrl_c_change_no_bit_and_leave_nothing(golden, cache, tmp_path):
    folder, segments = tmp_path / "run", set(os.listdir("/dev/shm"))
    run = started(folder, cache, 2)
    workers = children(supervisor_of(run))
    assert len(workers) == 2
    os.kill(random.Random(0).choice(workers), signal.SIGKILL)
    goes_on(run, folder, 3)
    os.kill(supervisor_of(run), signal.SIGKILL)
    goes_on(run, folder, 3)
    tree = descendants(run.pid)
    for pid in (run.pid, *tree):  # also those that Ctrl-C is not for
        os.kill(pid, signal.SIGINT)
    assert processes.ends([run]) == [75]
    output = processes.output(folder, 0)
    assert "was killed by SIGKILL" in output
    assert "the process that leads the worker processes ended; all are restarted" in output
    assert "Traceback" not in output
    assert not left(tree)
    processes.finish(folder, cache, processes=1, devices=1, fields={**FIELDS, "pause": 0.0})
    assert processes.same(folder, golden)
    assert set(os.listdir("/dev/shm")) <= segments


def test_a_run_that_is_killed_takes_its_workers_with_it_and_goes_on_with_the_same_bits(golden, cache, tmp_path):
    folder, segments = tmp_path / "run", set(os.listdir("/dev/shm"))
    for _ in range(2):
        run = started(folder, cache, 3)
        tree = descendants(run.pid)
        assert len(tree) >= 4
        run.kill()
        run.wait()
        assert not left(tree)
    processes.finish(folder, cache, processes=1, devices=1, fields={**FIELDS, "pause": 0.0})
    assert processes.same(folder, golden)
    assert set(os.listdir("/dev/shm")) <= segments


def test_memory_that_is_not_there_ends_the_run_at_its_start_in_one_line(cache, tmp_path):
    fields = {**FIELDS, "data.prefetch": 2**30}
    assert processes.ends(processes.start(tmp_path / "run", cache, processes=1, devices=1, fields=fields)) == [2]
    line = processes.output(tmp_path / "run", 0).splitlines()[-1]
    assert line.startswith("error: worker processes need ")
    assert "lower data.prefetch or batch_size" in line


@pytest.mark.skipif(not shutil.which("unshare") or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode,
                    reason="a /dev/shm of one's own needs user namespaces")
def test_a_full_dev_shm_is_no_matter(golden, cache, tmp_path):
    processes.peer.small_config(tmp_path)
    fill = "mount -t tmpfs -o size=64k tmpfs /dev/shm; head -c 1M /dev/zero > /dev/shm/full 2> /dev/null; "
    command = [sys.executable, "-m", "tests.faults.peer", str(tmp_path / "run"), "off", "-1", "-1", "5",
               processes.json.dumps(FIELDS | {"pause": 0.0})]
    script = f"{fill} echo x > /dev/shm/one && exit 9; exec \"$@\""
    done = subprocess.run([*UNSHARE, "sh", "-c", script, "sh", *command],
                          env=processes.environment(1, cache), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert processes.same(tmp_path / "run", golden)
