"""What the stand-in for a TPU worker has instead of pip, uv and Python: they write down how they were called.

`pip install` leaves a uv, `uv venv` a Python, and that Python does what the next item of the file `train.<worker>`
says: ends with an exit code, or waits for SIGTERM ('wait') to end with 75, as a run does that saves its state.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

HOME = Path(os.environ["HOME"])


def leave(path: Path) -> None:
    """Leaves this program under another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {Path(__file__).resolve()} "$0" "$@"\n')
    path.chmod(0o755)


def train() -> int:
    plan = Path(os.environ["FAKE_GCLOUD"]) / f"train.{HOME.name.split('.')[-1]}"
    items = json.loads(plan.read_text())
    plan.write_text(json.dumps(items[1:] or items))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("step 1", flush=True)
    while items[0] == "wait":
        time.sleep(60)
    return items[0]


def main(name: str, argv: list[str]) -> int:
    argv = [Path(arg.partition("=")[2]).read_text() if arg.startswith("--requirement=") else arg for arg in argv]
    with (HOME / "argv.jsonl").open("a") as calls:
        calls.write(json.dumps([Path(name).name, *argv]) + "\n")
    if argv[:2] == ["-m", "pip"]:
        target = next(arg for arg in argv if arg.startswith("--target=")).removeprefix("--target=")
        leave(Path(target) / "bin" / "uv")
    elif Path(name).name == "uv" and argv[0] == "venv":
        leave(Path(argv[-1]) / "bin" / "python")
    elif argv[:2] == ["-m", "mae_jax.main"]:
        return train()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
