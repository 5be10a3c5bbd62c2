"""A workdir has one living run, and a dead one does not keep it; real processes hold it, on disk and over HTTP."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from etils import epath

from mae_jax.errors import UserError
from mae_jax.storage import gcs as storage_gcs
from mae_jax.storage import leases, workdir_lock
from mae_jax.storage.checkpoint import Checkpoints
from mae_jax.storage.metric_writer import JsonLines
from mae_jax.training import workdir as training_workdir
from tests.helpers.tiny import tiny_config

HOLDER = """
import sys, time
from etils import epath
from mae_jax.commands import cli
from mae_jax.storage import leases, workdir_lock
leases.RENEWED, leases.DEAD = 0.2, 1.5
def hold():
    with workdir_lock.hold(epath.Path(sys.argv[1])):
        print("held", flush=True)
        for line in sys.stdin:
            workdir_lock.wait_until_verified()
            print("wrote", flush=True)
    return 0
sys.exit(cli.guarded(hold))
"""


@pytest.fixture
def holder(monkeypatch) -> Iterator:
    """Starts processes that hold a workdir until their input ends and write when they get a line."""
    monkeypatch.setattr(leases, "RENEWED", 0.2)
    monkeypatch.setattr(leases, "DEAD", 1.5)
    started = []

    def start(workdir: str) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, "-c", HOLDER, workdir], stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ))
        assert started[-1].stdout.readline() == "held\n", started[-1].stderr.read()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        with process:  # closes its pipes
            pass


@pytest.fixture(params=["disk", pytest.param("gs", marks=pytest.mark.bucket)])
def workdir(request, tmp_path) -> str:
    if request.param == "disk":
        return str(tmp_path / "run")
    request.getfixturevalue("gcs")
    storage_gcs.check("gs://bucket")
    return f"gs://bucket/{tmp_path.name}"


def take(workdir: str) -> float:
    """Holds a workdir for a moment; returns how long it took to get it."""
    began = time.monotonic()
    with workdir_lock.hold(epath.Path(workdir)):
        return time.monotonic() - began


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_living_run_is_refused_by_name_until_the_first_has_ended(holder, workdir):
    process = holder(workdir)
    with pytest.raises(UserError, match=rf"in use by .*process {process.pid} on "):
        take(workdir)
    process.stdin.close()
    assert process.wait(10) == 0
    assert take(workdir) < 1


def test_kill_9_frees_a_disk_at_once_and_a_bucket_after_its_time(holder, workdir, caplog):
    process = holder(workdir)
    process.kill()
    process.wait()
    seconds = take(workdir)
    if workdir.startswith("gs://"):
        assert leases.DEAD < seconds < leases.DEAD + 2
        assert f"was left by process {process.pid} on" in caplog.text
        assert "waiting up to 1.5 s to see" in caplog.text
        assert "took over" in caplog.text
    else:
        assert seconds < 0.5


def test_a_frozen_run_that_was_overtaken_writes_nothing_and_ends_when_it_wakes(holder, gcs):
    process = holder("gs://bucket/frozen")
    process.stdin.write("step\n")
    process.stdin.flush()
    assert process.stdout.readline() == "wrote\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(leases.DEAD)
    with workdir_lock.hold(epath.Path("gs://bucket/frozen")):
        process.stdin.write("step\n")
        process.stdin.flush()
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (3, "")
    assert f"gs://bucket/frozen was taken over by process {os.getpid()} on" in err
    assert "nothing more is written" in err


def test_a_run_whose_signs_of_life_do_not_arrive_writes_nothing_and_ends_when_it_sees_who_took_over(gcs, monkeypatch):
    monkeypatch.setattr(leases, "RENEWED", 0.2)
    monkeypatch.setattr(leases, "DEAD", 1.0)
    held, lost, workdir = leases.BucketLease(epath.Path("gs://bucket/cut/lock")), [], epath.Path("gs://bucket/cut")
    monkeypatch.setattr(leases.BucketLease, "_lost", lambda self, found: lost.append((found, self.renewed)))
    held.take()
    monkeypatch.setattr(workdir_lock, "_held", held)
    assert workdir_lock.why_unwritable() == ""
    checkpoints, recorder = Checkpoints(workdir, 1), JsonLines(workdir / "metrics.jsonl", 0)
    gcs.add({"path": "cut/lock", "method": "POST", "status": 400, "times": -1})
    wait_until(workdir_lock.why_unwritable)
    reason = r"the lease could not be renewed for \d+ s, so another run may have the workdir"
    assert re.search(reason, workdir_lock.why_unwritable())
    workdir_lock.wait_until_verified()  # training goes on
    recorder.write(1, {"loss": 1.0})
    recorder.flush()
    checkpoints.save(1, {"a": np.zeros(3)})
    assert "could not be renewed" in checkpoints.failed
    assert [name for name in gcs.store.bucket("bucket") if name.startswith("cut/")] == ["cut/lock"]
    gcs.clear()
    storage_gcs.write("gs://bucket/cut/lock", b"another run")
    wait_until(lambda: lost)
    assert lost[0][0].content == b"another run"
    held._over.set()
    monkeypatch.setattr(workdir_lock, "_held", None)
    checkpoints.close()


def test_a_frozen_run_that_nobody_overtook_goes_on(holder, gcs):
    process = holder("gs://bucket/rested")
    process.send_signal(signal.SIGSTOP)
    time.sleep(leases.DEAD)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate("step\n", timeout=10)
    assert (process.returncode, out) == (0, "wrote\n")
    assert storage_gcs.read("gs://bucket/rested/lock") is None


def test_a_lost_answer_or_an_outage_does_not_lose_the_lease(holder, gcs):
    for method in ("POST", "POST", "DELETE"):
        gcs.add({"path": "outage", "method": method, "kind": "lost"})
    process = holder("gs://bucket/outage")
    gcs.add({"path": "outage", "method": "POST", "status": 503, "times": 6})
    wait_until(lambda: gcs.faults[-1].done == 6)
    assert process.poll() is None
    before = storage_gcs.read("gs://bucket/outage/lock")
    wait_until(lambda: storage_gcs.read("gs://bucket/outage/lock").generation > before.generation)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 0, err


def test_nothing_may_be_written_is_one_line_with_the_role_to_ask_for(gcs):
    gcs.add({"path": "upload", "status": 403})
    with pytest.raises(UserError, match=r"workdir: gs://bucket/mine/lock: .*roles/storage.objectAdmin on gs://bucket"):
        take("gs://bucket/mine")


def test_a_folder_of_which_nothing_came_is_not_left_behind(tmp_path):
    take(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with workdir_lock.hold(epath.Path(tmp_path / "run")):
        (tmp_path / "run" / "config.json").touch()
    assert json.loads((tmp_path / "run" / "lock").read_text())["process"] == os.getpid()


def test_a_lock_that_cannot_be_made_again_is_tried_until_it_can_and_harms_no_other_file(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    lock, folder = leases.FileLock(epath.Path(tmp_path / "run" / "lock")), tmp_path / "run"
    lock.take()
    shutil.rmtree(folder)
    folder.write_text("in the way")
    assert "a file is in its place" in lock.why_unwritable()
    with open(tmp_path / "other", "w") as other:  # it may get the number of the descriptor that was closed
        assert "a file is in its place" in lock.why_unwritable()
        other.write("whole")
    folder.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(leases.fcntl, "flock", broken)
        assert "Input/output error" in lock.why_unwritable()
        assert "Input/output error" in lock.why_unwritable()
        lock.give_back()
        assert (folder / "lock").exists()  # not known to be ours
    lock.take()
    assert lock.why_unwritable() == ""
    lock.give_back()


def test_a_lock_that_was_removed_is_made_again_unless_another_run_has_it(tmp_path, holder, caplog, monkeypatch):
    lock = leases.FileLock(epath.Path(tmp_path / "run" / "lock"))
    lock.take()
    shutil.rmtree(tmp_path / "run")
    assert lock.why_unwritable() == ""
    assert "had been removed, and is there again" in caplog.text
    with pytest.raises(UserError, match=f"in use by .*process {os.getpid()} on"):
        take(str(tmp_path / "run"))
    (tmp_path / "run" / "lock").unlink()
    other = holder(str(tmp_path / "run"))
    assert f"in use by another run: process {other.pid} on" in lock.why_unwritable()
    assert f"in use by another run: process {other.pid} on" in lock.why_unwritable()
    monkeypatch.setattr(workdir_lock, "_held", lock)
    training_workdir.keep(epath.Path(tmp_path / "run"), tiny_config(), None)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
    monkeypatch.setattr(workdir_lock, "_held", None)
    other.kill()
    other.wait()
    assert lock.why_unwritable() == ""
    lock.give_back()
    assert take(str(tmp_path / "run")) < 1


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(leases.fcntl, "flock", none)
    take(str(tmp_path))
    assert "has no locks: a second run is not detected" in caplog.text


def test_a_workdir_that_cannot_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"workdir .*: Not a directory"):
        take(str(tmp_path / "file" / "run"))


@pytest.fixture
def ended(monkeypatch) -> list:
    """What would have ended the process."""
    lines = []
    monkeypatch.setattr(leases.Lease, "_stop", lambda self, line: lines.append(line) or sys.exit(3))
    return lines


@pytest.mark.parametrize("there", ["the folder under it", "nothing"])
def test_a_disk_that_is_unmounted_under_a_run_ends_it_and_nothing_is_made_where_it_was(tmp_path, monkeypatch, ended,
                                                                                       there):
    folder, real = tmp_path / "disk" / "run", leases._device
    with workdir_lock.hold(epath.Path(folder)):
        assert workdir_lock.why_unwritable() == ""
        (tmp_path / "disk").rename(tmp_path / "away")  # as the path after `umount -l`: another folder, on another disk
        (folder if there != "nothing" else tmp_path / "disk").mkdir(parents=True)
        monkeypatch.setattr(leases, "_device", lambda path: real(path) + 1)
        with pytest.raises(SystemExit):
            workdir_lock.why_unwritable()
        assert str(folder) in ended[0]
        assert not (folder / "lock").exists()


def test_checkpoints_that_are_a_link_to_another_disk_are_looked_at_too(tmp_path, monkeypatch, ended):
    (tmp_path / "run").mkdir()
    (tmp_path / "big").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "big")
    with workdir_lock.hold(epath.Path(tmp_path / "run")):
        assert workdir_lock.why_unwritable() == ""
        real = leases._device
        monkeypatch.setattr(leases, "_device", lambda path: real(path) + path.endswith("checkpoints"))
        with pytest.raises(SystemExit):
            workdir_lock.why_unwritable()
    assert str(tmp_path / "run" / "checkpoints") in ended[0]


def test_a_folder_that_somebody_removed_is_no_other_disk(tmp_path, ended):
    with workdir_lock.hold(epath.Path(tmp_path / "run")):
        shutil.rmtree(tmp_path / "run")
        assert workdir_lock.why_unwritable() == ""
    assert ended == []


UNMOUNTED = """
import subprocess, sys
from pathlib import Path
from etils import epath
from mae_jax.storage import workdir_lock
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "none", disk], check=True)
with workdir_lock.hold(epath.Path(disk / "run")):
    assert workdir_lock.why_unwritable() == ""
    subprocess.run(["umount", "-l", disk], check=True)
    print("unmounted", flush=True)
    workdir_lock.why_unwritable()
    print("went on")
"""


@pytest.mark.slow
def test_a_lazy_unmount_of_a_real_disk_ends_a_run(tmp_path):
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*alone, "mount", "-t", "tmpfs", "none", tmp_path],
                                                     capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run([*alone, sys.executable, "-c", UNMOUNTED, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "unmounted\n"), done.stderr
    assert str(tmp_path / "run") in done.stderr
    assert not list(tmp_path.iterdir())
