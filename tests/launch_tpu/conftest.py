"""A small repository with the launcher, and a cloud that is not there."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import fake_gcloud
from tests.helpers.fake_cloud import RECORD, ROOT, SCRIPTS, TYPES, Cloud


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small repository with one commit."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("configs", "mae_jax/training", "mae_jax/commands/plan", "scripts"):
        (root / name).mkdir(parents=True)
    for path in (*SCRIPTS, TYPES, ROOT / ".gitattributes"):
        shutil.copy(path, root / path.relative_to(ROOT))
    (root / "configs" / "vit_l_mae.py").write_text("")
    (root / RECORD).write_text('ARCHIVED = "$Format:%H$"')
    for command in (["init", "--quiet"], ["add", "."],
                    ["-c", "user.name=a", "-c", "user.email=b", "commit", "--quiet", "--message=c"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """Takes back that Ctrl-C is ignored, which a shell does for what it starts in the background: bash inherits it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def cloud(tmp_path: Path, repository: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path, repository)
    yield cloud
    fake_gcloud.HERE = tmp_path
    for launcher in cloud.launchers:
        if launcher.returncode is None:  # the test failed
            os.killpg(launcher.pid, signal.SIGKILL)
    for number in range(fake_gcloud.WORKERS):
        fake_gcloud.kill(number)
    for launcher in cloud.launchers:
        launcher.communicate()
