"""The memory that the input pipeline holds over time.

  python benchmarks/input_memory.py --minutes=60

Work as in input_pipeline.py: JPEGs of about 100 kB, random resized crop to 224 x 224, flip, permuted patches. Each arm
runs in a process of its own, all at the same time, at a fixed rate, so that an hour leaves the machine usable. Every
minute, each arm reports the proportional set size of itself and of the processes that it started (memory that several
of them map counts once), their open files and threads. The table has the slope of a straight line through the second
half. Linux only.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import input_pipeline
import numpy as np

ARMS = {"processes": {"data.workers": "2"}, "threads": {"data.workers": "0", "data.threads": 2},
        "graph": {"data.resize": "graph", "data.workers": "0", "data.threads": 2}}
RESULTS = Path(__file__).parent / "results" / "input_memory.json"
BATCH = 16


def held() -> dict[str, float]:
    """Returns what this process and those that it started hold: MiB of memory, open files, threads, processes."""
    total = {"mib": 0.0, "files": 0, "threads": 0, "processes": 0}
    for pid in input_pipeline.descendants():
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total["mib"] += int(rollup.split("Pss:")[1].split()[0]) / 1024
            total["files"] += len(os.listdir(f"/proc/{pid}/fd"))
            total["threads"] += len(os.listdir(f"/proc/{pid}/task"))
            total["processes"] += 1
        except (OSError, IndexError):
            continue
    return total


def run(arm: str, folder: str, minutes: float, rate: float) -> list[dict[str, float]]:
    """Takes `rate` images per second; returns what is held, each minute."""
    from mae_jax import config, data
    from mae_jax.methods.mae import MAE

    c = config.default()
    c.batch_size = BATCH
    c.data.update({"source": "folder", "path": folder, "eval_split": ""})
    c.update_from_flattened_dict(ARMS[arm])
    method = MAE(config.resolved(c), data.NO_DATA)
    batches = data.OpenedData(c).batches(method.batch_spec(), method.patch_order()).train(0)
    rows, began, taken = [], time.monotonic(), 0
    while (now := time.monotonic() - began) <= 60 * minutes:
        if now >= 60 * len(rows):
            rows.append({"seconds": round(now), "images": taken, **held()})
        next(batches)
        taken += BATCH
        time.sleep(max(0.0, began + taken / rate - time.monotonic()))
    return rows


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Returns the results as Markdown."""
    lines = ["# Memory of the input over time", "",
             "What each process and those that it started hold, by proportional set size "
             "(`python benchmarks/input_memory.py --minutes=60 --rate=8`).", "",
             "| arm | minutes | images | MiB after 1 minute | at half time | at the end | MiB per hour, second half "
             "| open files, first and last | processes |", "|" + " --- |" * 9]
    for arm, found in rows.items():
        half = found[len(found) // 2:]
        slope = np.polyfit([row["seconds"] / 3600 for row in half], [row["mib"] for row in half], 1)[0]
        lines.append(f"| {arm} | {found[-1]['seconds'] / 60:.0f} | {found[-1]['images']:,} | {found[1]['mib']:.0f} | "
                     f"{half[0]['mib']:.0f} | {found[-1]['mib']:.0f} | {slope:+.1f} | {found[1]['files']:.0f}, "
                     f"{found[-1]['files']:.0f} | {found[-1]['processes']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=12, help="images per second of each arm")
    parser.add_argument("--arm", default="", help="run this one alone, in this process")
    parser.add_argument("--folder", default="", help="of the JPEGs, with --arm")
    parser.add_argument("--to", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run(args.arm, args.folder, args.minutes, args.rate)))
        return
    with tempfile.TemporaryDirectory() as folder:
        input_pipeline.make_pictures(Path(folder))
        started = {arm: subprocess.Popen(
            [sys.executable, __file__, f"--arm={arm}", f"--folder={folder}", f"--minutes={args.minutes}",
             f"--rate={args.rate}"], stdout=subprocess.PIPE, text=True) for arm in ARMS}
        ends = {arm: process.communicate()[0] for arm, process in started.items()}
    rows = {arm: json.loads(text.splitlines()[-1]) for arm, text in ends.items()}
    args.to.write_text(json.dumps({"machine": platform.platform(), "rate": args.rate, "rows": rows}) + "\n")
    args.to.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
