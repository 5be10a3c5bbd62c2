"""The stand-in's state, and launchers that use it; for the tests of launch_tpu.sh."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.helpers import fake_gcloud

ROOT = Path.cwd()
SCRIPTS = [ROOT / "launch_tpu.sh", ROOT / "scripts" / "launch_tpu_worker.sh"]
TYPES = ROOT / "mae_jax" / "commands" / "plan" / "tpu_types.csv"
RECORD = "mae_jax/training/workdir.py"  # where git writes the commit of an archive
WHOLE = ["create", "scp", "install", "start", "follow", "report", "delete"]
SLICE = ["--name=vit-l", "--zone=z-1", "--type=v3-32"]
TRAIN = ["--config=configs/vit_l_mae.py", "--workdir=gs://bucket/run"]


class Cloud:
    """The stand-in's state, and launchers that use it."""

    def __init__(self, folder: Path, repository: Path):
        self.folder, self.repository = folder, repository
        for name, program in (("bin/gcloud", "fake_gcloud"), ("worker_bin/python3", "fake_worker")):
            path, module = folder / name, Path(fake_gcloud.__file__).with_name(f"{program}.py")
            path.parent.mkdir()
            own_name = '"$0" ' if program == "fake_worker" else ""
            path.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {module} {own_name}"$@"\n')
            path.chmod(0o755)
        self.environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder),
                            "FAKE_GCLOUD": str(folder), "LAUNCH_TPU_PAUSE": "0"}
        self.launchers: list[subprocess.Popen] = []
        self.plan()

    def plan(self, train: Any = (0,), **scenario: list[str]) -> None:
        """Says what happens next: `train` is a list of exit codes and 'wait's, or one for each worker."""
        (self.folder / "scenario.json").write_text(json.dumps(scenario))
        for number in range(fake_gcloud.WORKERS):
            items = train[number] if isinstance(train[0], list) else train
            (self.folder / f"train.{number}").write_text(json.dumps(list(items)))

    def start(self, *args: str) -> subprocess.Popen:
        self.launchers.append(subprocess.Popen(
            [self.repository / "launch_tpu.sh", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            stdin=subprocess.DEVNULL, cwd=self.folder, start_new_session=True, env=self.environment))
        return self.launchers[-1]

    def launch(self, *args: str) -> subprocess.CompletedProcess:
        process = self.start(*args)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def run(self, *options: str, train: list[str] = TRAIN) -> subprocess.CompletedProcess:
        return self.launch("run", *SLICE, *options, "--", *train)

    def argvs(self) -> list[list[str]]:
        """Returns how gcloud was called."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def calls(self) -> list[str]:
        """Returns what gcloud was called for, without the looks at states: create, scp, install, delete ..."""
        done = []
        for argv in self.argvs():
            command = [arg for arg in argv if arg.startswith("--command=")]
            doing = command[0].split("launch_tpu_worker.sh ")[1].split()[0] if command else argv[3]
            done += [doing] * (doing != "list")
        return done

    def workers(self) -> list[list[list[str]]]:
        """Returns the programs that the workers ran, those of lost workers first."""
        paths = sorted(self.folder.glob("gone.*/argv.jsonl")) + sorted(self.folder.glob("worker.*/argv.jsonl"))
        return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]

    def trained(self) -> list[list[list[str]]]:
        """Returns the arguments of every training on every worker."""
        return [[call[3:] for call in calls if call[:3] == ["python", "-m", "mae_jax.main"]]
                for calls in self.workers()]

    def wait_until_it_follows(self, launcher: subprocess.Popen, times: int = 1) -> None:
        """Waits until the logs of the first training are shown, for the n-th time, over a connection that holds."""
        connected, deadline = self.folder / "connected", time.monotonic() + 60
        while (not connected.exists() or connected.read_text().split().count("follow") < times
               or [len(runs) for runs in self.trained()] != [1, 1]):
            assert launcher.poll() is None, launcher.communicate()[1]
            assert time.monotonic() < deadline, self.trained()
            time.sleep(0.05)


def interrupt(launcher: subprocess.Popen) -> str:
    """Presses Ctrl-C and returns what the launcher said."""
    os.killpg(launcher.pid, signal.SIGINT)
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 130
    return err
