"""launch_tpu.sh against a stand-in for gcloud: what goes wrong, when it starts again, what the user does meanwhile."""

import shutil
import subprocess
import sys

import pytest

from tests.helpers.fake_cloud import SLICE, TRAIN, WHOLE, interrupt

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the workers' part needs Linux's flock and setsid")

DELETE = "./launch_tpu.sh delete --name=vit-l --zone=z-1"


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
        "--runtime-version=tpu-ubuntu2204-base", "--accelerator-type=v3-32", "--spot", "--zone=z-1", "--quiet"]
    assert cloud.argvs()[-1] == ["compute", "tpus", "queued-resources", "delete", "vit-l", "--force", "--zone=z-1",
                                 "--quiet"]
    said = [line.removeprefix("[launch] vit-l is ") for line in done.stderr.splitlines() if " is " in line]
    assert said[:5] == ["absent", "waiting: the request is WAITING_FOR_RESOURCES",
                        "waiting: the request is PROVISIONING", "waiting: it is CREATING", "ready"]


@pytest.mark.slow
def test_several_slices_are_one_request_all_of_them_are_waited_for_and_all_workers_are_told(cloud):
    cloud.plan(request=["PROVISIONING", "ACTIVE"], node=["CREATING CREATING", "READY CREATING", "READY READY"])
    done = cloud.run("--queued", "--slices=2")
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == WHOLE
    assert cloud.trained() == [[TRAIN], [TRAIN]]
    made, = (argv for argv in cloud.argvs() if argv[3] == "create")
    assert made[2:7] == ["queued-resources", "create", "vit-l", "--node-count=2", "--node-prefix=vit-l"]
    reached = [argv for argv in cloud.argvs() if argv[3] in ("ssh", "scp")]
    assert {tuple(argv[:3]) for argv in reached} == {("compute", "tpus", "queued-resources")}
    assert all({"--node=all", "--worker=all"} < set(argv) for argv in reached)
    said = [line.removeprefix("[launch] vit-l is ") for line in done.stderr.splitlines() if " is " in line]
    assert said[:4] == ["absent", "waiting: the request is PROVISIONING", "waiting: it is CREATING", "ready"]


@pytest.mark.slow
def test_one_lost_slice_of_several_makes_all_of_them_anew(cloud):
    cloud.plan(node=["READY PREEMPTED", "READY PREEMPTED", "READY READY"])
    assert cloud.run("--queued", "--slices=2").returncode == 0
    assert cloud.calls() == ["create", "delete", *WHOLE]


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
