"""A stand-in for `gcloud compute tpus`: a slice of two workers, or two of one, which are folders of this machine.

It writes down how it was called, does what `scenario.json` says, and fails on purpose. What is to run on the workers
really runs, under bash, so that quoting, locks and signals are the true ones; only pip, uv and Python are stand-ins. As
the true one it returns the code of the first worker that failed, 255 for a connection.

The scenario has lists, of which each call takes the next item and keeps the last: `node` and `request` are the states
that are listed (two words: of two slices, one each); `create`, `list` and `delete` messages of errors, '' for none; the
name of what workers do (`install`, `start`, `follow`, `report`) is a list of '' (do it), 'refused' (255, nothing is
done), 'twice' (again, once the log has a line), 'drop' (255, once the log has a line), 'preempted' (as drop, and the
slice is PREEMPTED).
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

WORKERS = 2
HERE = Path(os.environ.get("FAKE_GCLOUD", "."))


def following(event: str, default: str = "") -> str:
    """Takes the next item of the scenario's list; the last one stays."""
    path = HERE / "scenario.json"
    scenario = json.loads(path.read_text())
    items = scenario.get(event) or [default]
    if len(items) > 1:
        path.write_text(json.dumps(scenario | {event: items[1:]}))
    return items[0]


def error(text: str) -> int:
    print(f"ERROR: (gcloud.compute.tpus) {text}", file=sys.stderr)
    return 1


def create(kind: str, argv: list[str]) -> int:
    if problem := following("create"):
        return error(problem)
    (HERE / kind).touch()
    if kind == "queued-resources":
        (HERE / "tpu-vm").touch()
    for number in range(WORKERS):
        home(number).mkdir()
    return 0


def listed(kind: str, argv: list[str]) -> int:
    if problem := following("list"):
        return error(problem)
    print("another-slice,READY")
    request, preempted = HERE / "queued-resources", (HERE / "preempted").exists()
    state = ""
    if kind == "queued-resources" and request.exists():
        state = "SUSPENDED" if preempted else following("request", "ACTIVE")
        request.write_text(state)
    elif kind == "tpu-vm" and (HERE / kind).exists() and (not request.exists() or request.read_text() == "ACTIVE"):
        state = "PREEMPTED" if preempted else following("node", "READY")
    if state and kind == "tpu-vm" and (count := created("--node-count=")):
        states = state.split()
        for number in range(min(int(count), len(states)) if len(states) > 1 else int(count)):
            print(f"{created('--node-prefix=')}-{number},{states[number % len(states)]}")
    elif state:
        print(f"{slice_name()},{state}")
    return 0


def created(option: str) -> str:
    """Returns the value of an option that create was told, '' without it."""
    calls = [json.loads(line) for line in (HERE / "calls.jsonl").read_text().splitlines()]
    told = next(call for call in calls if call[3] == "create")
    return next((word.removeprefix(option) for word in told if word.startswith(option)), "")


def slice_name() -> str:
    """Returns the name of the slice, which create was told."""
    calls = [json.loads(line) for line in (HERE / "calls.jsonl").read_text().splitlines()]
    return next(call[4] for call in calls if call[3] == "create")


def delete(kind: str, argv: list[str]) -> int:
    if problem := following("delete"):
        return error(problem)
    for gone in {kind, "tpu-vm"}:
        (HERE / gone).unlink()
    (HERE / "preempted").unlink(missing_ok=True)
    for number in range(WORKERS):
        kill(number)
        home(number).rename(HERE / f"gone.{time.monotonic_ns()}.{number}")
    return 0


def home(number: int) -> Path:
    return HERE / f"worker.{number}"


def kill(number: int) -> None:
    """Kills what runs on a worker, as its loss would."""
    group = home(number) / "mae_jax" / "group"
    if group.exists() and subprocess.run(["flock", "-n", group.with_name("alive"), "true"]).returncode:
        os.killpg(int(group.read_text()), signal.SIGKILL)


def copy(argv: list[str]) -> int:
    for number in range(WORKERS):
        (home(number) / argv[1].split(":")[1]).write_bytes(Path(argv[0]).read_bytes())
    return 0


def execute(command: str) -> list[subprocess.Popen]:
    """Starts the command on all workers."""
    return [subprocess.Popen(
        ["bash", "-c", command], stdin=subprocess.DEVNULL, start_new_session=True, cwd=home(number),
        env={"HOME": str(home(number)), "HOSTNAME": f"t1v-n-0a1b2c-w-{number}", "FAKE_GCLOUD": str(HERE),
             "PATH": f"{HERE / 'worker_bin'}:{os.environ['PATH']}"}) for number in range(WORKERS)]


def wait_for_logs() -> None:
    logs = [home(number) / "mae_jax" / "log" for number in range(WORKERS)]
    while not all(log.exists() and log.stat().st_size for log in logs):
        time.sleep(0.02)


def ssh(command: str) -> int:
    doing = re.search(r"worker\.sh (\w+)", command)[1]
    how = following(doing)
    if how == "refused":
        return 255
    runs = execute(command)
    if how == "twice":
        wait_for_logs()
        runs += execute(command)
    if how in ("drop", "preempted"):
        wait_for_logs()
        for run in runs:
            os.killpg(run.pid, signal.SIGKILL)
        if how == "preempted":
            (HERE / "preempted").touch()
            for number in range(WORKERS):
                kill(number)
        return 255
    try:
        with (HERE / "connected").open("a") as connected:
            connected.write(f"{doing}\n")
        codes = [run.wait() for run in runs]
    except KeyboardInterrupt:  # the connections end, and with them what follows a log
        for run in runs:
            os.killpg(run.pid, signal.SIGKILL)
        return 1
    return next((code for code in codes if code), 0)


def main(argv: list[str]) -> int:
    with (HERE / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(argv) + "\n")
    _, _, kind, verb, *rest = argv
    if verb == "ssh":
        return ssh(next(arg for arg in argv if arg.startswith("--command=")).removeprefix("--command="))
    if verb == "scp":
        return copy(rest)
    return {"create": create, "list": listed, "delete": delete}[verb](kind, rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
