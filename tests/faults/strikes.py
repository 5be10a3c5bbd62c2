"""The faults of the soak: what is done to a run, and with which exit codes it may end."""

import contextlib
import functools
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.gcs.server import Server

Processes = list[subprocess.Popen]
Environment = dict[str, str]
SAVED, QUIT = 75, 130
LOST = frozenset({134, -6, 2})


class Strike(NamedTuple):
    """One kind of fault.

    Attributes:
      strike: does it to living processes.
      codes: exit codes that it explains; 0 always, for a run that was nearly over. A SIGTERM that comes before there is
        a handler kills.
      before: does it to the workdir before the run is started; False where there is nothing to do it to.
      shared: it may be done to several processes.
      lost: further codes of several processes, where one was lost; 2: before they had met.
    """

    name: str
    strike: Callable[[Processes, random.Random, Path, Environment], None] = lambda *_: None
    codes: frozenset[int] = frozenset({0})
    before: Callable[[Path, random.Random], bool] | None = None
    shared: bool = True
    lost: frozenset[int] = frozenset()


def _send(*numbers: int) -> Callable[[Processes, random.Random, Path, Environment], None]:
    """Returns what sends the signals to one process, a random moment after each other."""
    def strike(processes: Processes, draws: random.Random, *_: object) -> None:
        victim = draws.choice(processes)
        for place, number in enumerate(numbers):
            if place:
                time.sleep(draws.uniform(0, 0.3))
            victim.send_signal(number)
    return strike


def _freeze(processes: Processes, draws: random.Random, *_: object) -> None:
    """Stops a process and lets it go on, within the time in which a silent peer counts as alive."""
    victim = draws.choice(processes)
    victim.send_signal(signal.SIGSTOP)
    time.sleep(draws.uniform(0.2, 2))
    victim.send_signal(signal.SIGCONT)


def _full_disk(processes: Processes, draws: random.Random, *_: object) -> None:
    """Lets no file of a process grow past some bytes, as on a full disk; lifted after a while."""
    victim, most = draws.choice(processes), draws.choice([0, 100, 4096, 60_000])
    with contextlib.suppress(ProcessLookupError):  # it has ended
        before = resource.prlimit(victim.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        time.sleep(draws.uniform(0.2, 3))
        resource.prlimit(victim.pid, resource.RLIMIT_FSIZE, before)


def _second_run(processes: Processes, draws: random.Random, run: Path, environment: Environment) -> None:
    """Starts the same command once more; one of the two is refused."""
    with Path(f"{run}.out.{len(processes)}").open("w") as out:
        processes.append(subprocess.Popen(processes[0].args, env=environment, stdout=out, stderr=subprocess.STDOUT))


def _steps(run: Path) -> list[Path]:
    """Returns the folders of committed steps, oldest first."""
    return sorted((path for path in run.glob("checkpoints/*") if path.name.isdigit()), key=lambda path: int(path.name))


def _damage(run: Path, draws: random.Random) -> bool:
    """Flips a bit of a file of the newest checkpoint, cuts it, empties it or deletes it, where there is one before."""
    if len(steps := _steps(run)) < 2 or (run / "DONE").exists():  # who has finished reads nothing more
        return False
    file = draws.choice(sorted(path for path in steps[-1].rglob("*") if path.is_file()))
    content, how = bytearray(file.read_bytes()), draws.choice(["flip", "cut", "empty", "delete"])
    if how == "delete":
        file.unlink()
    elif how == "flip" and content:
        content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        file.write_bytes(content)
    else:
        file.write_bytes(content[: draws.randrange(len(content)) if how == "cut" and content else 0])
    return True


def _litter(run: Path, draws: random.Random) -> bool:
    """Leaves what interrupted saves, other programs and people leave in a workdir, where a checkpoint is."""
    if not (steps := _steps(run)):
        return False
    folder = run / "checkpoints"
    what = draws.choice(["temporary", "foreign", "empty", "copy", "line"])
    if what == "temporary":
        shutil.copytree(steps[-1], folder / f"{int(steps[-1].name) + 4}.orbax-checkpoint-tmp-1")
    elif what == "foreign":
        (folder / "notes").mkdir(exist_ok=True)
        (folder / "notes.txt").write_text("mine")
    elif what == "empty":
        (folder / f"{int(steps[-1].name) + 1}").mkdir(exist_ok=True)
    elif what == "copy":
        shutil.copytree(steps[-1] / "state", folder / f"{int(steps[-1].name) + 2}" / "state")
    else:
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "train/lo')
    return True


ALL = (
    Strike("kill -9", _send(signal.SIGKILL), frozenset({0, -9}), lost=LOST),
    Strike("SIGTERM", _send(signal.SIGTERM), frozenset({0, SAVED, -15}), lost=LOST),
    Strike("Ctrl-C", _send(signal.SIGINT), frozenset({0, SAVED}), lost=LOST),
    Strike("Ctrl-C twice", _send(signal.SIGINT, signal.SIGINT), frozenset({0, SAVED, QUIT}), lost=LOST),
    Strike("frozen for a while", _freeze),
    Strike("full disk", _full_disk, frozenset({0, 2})),
    Strike("a second run", _second_run, frozenset({0, 2}), shared=False),
    Strike("damaged checkpoint", before=_damage),
    Strike("litter", before=_litter),
)

ANSWERS = {  # what a bucket does to requests: exit codes besides 0, and fields of the fault but for their number
    "503": (set(), {"status": 503}), "429": (set(), {"status": 429}), "500": (set(), {"status": 500}),
    "reset": (set(), {"kind": "reset"}), "lost answer": (set(), {"kind": "lost"}),
    "slow": (set(), {"kind": "slow", "seconds": 1.5}), "flipped bit": (set(), {"kind": "flip", "method": "GET"}),
    "cut answer": (set(), {"kind": "cut", "method": "GET"}), "delete forbidden": (set(), {"status": 403,
                                                                                       "method": "DELETE"}),
    "all forbidden": ({2}, {"status": 403}),
}


def of_bucket(server: Server) -> list[Strike]:
    """Returns the faults of a bucket: one to four requests are answered otherwise."""
    def strike(fault: dict[str, Any], processes: Processes, draws: random.Random, *_: object) -> None:
        server.add({"path": "", **fault, "times": draws.randint(1, 4)})

    return [Strike(f"bucket: {name}", functools.partial(strike, fault), frozenset({0, *codes}))
            for name, (codes, fault) in ANSWERS.items()]
