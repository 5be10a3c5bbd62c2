"""Many faults at random moments, drawn by a seed: what comes out must be what an undisturbed run makes, bit for bit.

  python -m tests.faults.soak --faults=200 --seed=0 --to=tests/faults/results/soak.jsonl

Each trial takes one setting (a process with one device, one with four and a sharded state, two processes, a process
whose workdir is in a bucket, served over HTTP) and one to four faults. For each fault it starts the run and strikes at
a random moment between the time when all processes have imported what they need and the end of an undisturbed run;
then it starts the run undisturbed, and compares all bits of the last state and the examples of every step with those
of a golden run. Every process must end within a bound, with an exit code that its fault explains, and without a
traceback. One JSON line per trial; a campaign that was interrupted goes on where it was.
"""

import argparse
import collections
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults import strikes
from tests.faults.processes import ends, environment, output, same, start, wait_for
from tests.faults.strikes import Strike
from tests.gcs import server

SETTINGS = {  # processes, devices of all, fields
    "one device": (1, 1, {}),
    "sharded": (1, 4, {"mesh.data": 1, "mesh.fsdp": 4, "model.width": 128, "model.heads": 4}),
    "two processes": (2, 2, {}),
    "bucket": (1, 1, {"lease": (0.5, 3.0)}),
}
BUCKET = "soak"
PAUSE = 0.05  # seconds that every batch takes: the run shall not be over before it can be struck
START = 15.0  # seconds for processes to find each other
BOUND = 60.0  # seconds in which all processes must have ended after a fault; a silent peer is lost after 5 s


class Lab:
    """Where runs are made: golden ones, their lengths, a cache of compiled programs, a bucket."""

    def __init__(self, folder: Path, bucket: server.Server):
        self.folder, self.cache, self.bucket = folder, folder / "compiled", bucket
        self.more = server.environment(bucket.url)
        self.lengths: dict[str, float] = {}

    def start(self, run: Path, setting: str) -> list:
        processes, devices, fields = SETTINGS[setting]
        for begun in run.parent.glob(f"{run.name}.begun.*"):
            begun.unlink()
        where = {"workdir": f"gs://{BUCKET}/{run.name}"} if setting == "bucket" else {}
        found = start(run, self.cache, processes, devices, {**fields, **where, "pause": PAUSE, "start_seconds": START},
                      more=self.more)
        for number in range(processes) if processes > 1 else (-1,):
            wait_for(Path(f"{run}.begun.{number}"), found)
        return found

    def end(self, run: Path, setting: str) -> list[int]:
        """Runs to the end; returns the exit codes. What is in the bucket lies in the run's folder then."""
        codes = ends(self.start(run, setting))
        for name, stored in self.bucket.store.buckets[BUCKET].items() if setting == "bucket" else ():
            if name.startswith(f"{run.name}/"):
                (run.parent / name).parent.mkdir(parents=True, exist_ok=True)
                (run.parent / name).write_bytes(stored.content)
        return codes

    def golden(self, setting: str) -> Path:
        """Returns the undisturbed run of a setting, made when it is asked for first."""
        run = self.folder / setting.replace(" ", "_") / "golden"
        if setting not in self.lengths:
            run.parent.mkdir()
            for name in ("golden", "warm"):  # the second finds its programs compiled
                began, codes = time.monotonic(), self.end(run.with_name(name), setting)
                assert set(codes) == {0}, output(run.with_name(name), 0)
                self.lengths[setting] = time.monotonic() - began
        return run

    def struck(self, run: Path, setting: str, draws: random.Random, strike: Strike) -> dict[str, Any]:
        """Starts a run, strikes, waits for its end; returns what happened. `struck` is False where it came too late."""
        if strike.before and not strike.before(run, draws):
            return {"fault": strike.name, "struck": False}
        count, devices, _ = SETTINGS[setting]
        processes, after = self.start(run, setting), draws.uniform(0, self.lengths[setting])
        time.sleep(after)
        living = [process.poll() for process in processes] == [None] * len(processes)
        began = time.monotonic()
        try:
            if living:
                strike.strike(processes, draws, run, environment(devices // count, self.cache) | self.more)
            codes: list[Any] = ends(processes, BOUND)
        except subprocess.TimeoutExpired:
            codes = ["hangs"]
        finally:
            ends(processes)
        self.bucket.clear()
        outputs = [output(run, number) for number in range(len(processes))]
        allowed = strike.codes | (strike.lost if count > 1 else frozenset()) if living else {0}
        fine = all(code in allowed for code in codes) and not any("Traceback" in text for text in outputs)
        told = {} if fine else {"output": [text[-3000:] for text in outputs]}
        return {"fault": strike.name, "after": round(after, 2), "struck": living or bool(strike.before), "codes": codes,
                "seconds": round(time.monotonic() - began, 2), "explained": fine, **told}


def trial(lab: Lab, seed: int, number: int, settings: Sequence[str]) -> dict[str, Any]:
    """Returns the line of trial `number`."""
    draws = random.Random(f"{seed} {number}")
    setting = draws.choice(settings)
    golden, run = lab.golden(setting), lab.folder / setting.replace(" ", "_") / f"run_{number}"
    possible = [strike for strike in strikes.ALL if SETTINGS[setting][0] == 1 or strike.shared]
    if setting == "bucket":
        possible = [strike for strike in possible if strike.before is None] + strikes.of_bucket(lab.bucket)
    found = [lab.struck(run, setting, draws, draws.choice(possible)) for _ in range(draws.randint(1, 4))]
    line = {"trial": number, "setting": setting, "faults": [fault for fault in found if fault["struck"]]}
    if all(fault.get("explained", True) for fault in found):
        codes = lab.end(run, setting)
        line |= {"end": codes, "same": not any(codes) and same(run, golden)}
    return line


def report(lines: list[dict[str, Any]]) -> str:
    """Returns the table of a campaign in Markdown."""
    faults = [fault | {"setting": line["setting"]} for line in lines for fault in line["faults"]]
    rows = ["| fault | " + " | ".join(SETTINGS) + " | exit codes | seconds to the end, most | not explained |",
            "|---" * (len(SETTINGS) + 4) + "|"]
    for name in sorted({fault["fault"] for fault in faults}):
        ours = [fault for fault in faults if fault["fault"] == name]
        codes = collections.Counter(code for fault in ours for code in fault["codes"])
        codes = ", ".join(f"{code} ({count})" for code, count in sorted(codes.items(), key=str))
        counts = [str(sum(fault["setting"] == setting for fault in ours)) for setting in SETTINGS]
        rows.append(f"| {name} | {' | '.join(counts)} | {codes} | "
                    f"{max(fault['seconds'] for fault in ours):.1f} | "
                    f"{sum(not fault['explained'] for fault in ours)} |")
    diverged = sum(not line.get("same") for line in lines)
    return "\n".join([f"{len(faults)} faults in {len(lines)} runs; {diverged} runs did not end with the bits and the "
                      "examples of the undisturbed one.", "", *rows, ""])


def campaign(faults: int, seed: int, to: Path, settings: Sequence[str] = tuple(SETTINGS)) -> str:
    """Goes on until so many faults have struck runs of these settings; returns the table."""
    text = to.read_text() if to.exists() else ""
    if text and not text.endswith("\n"):  # the line of a trial that was interrupted
        to.write_text(text := text[:text.rfind("\n") + 1])
    lines = [json.loads(line) for line in text.splitlines()]
    with tempfile.TemporaryDirectory() as scratch, server.serving(BUCKET) as bucket:
        lab = Lab(Path(scratch), bucket)
        while sum(len(line["faults"]) for line in lines) < faults:
            lines.append(trial(lab, seed, len(lines), settings))
            with to.open("a") as out:
                out.write(json.dumps(lines[-1]) + "\n")
            print(json.dumps(lines[-1]), flush=True)
    table = f"`python -m tests.faults.soak --faults={faults} --seed={seed}`\n\n{report(lines)}"
    to.with_suffix(".md").write_text(table)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=Path("tests/faults/results/soak.jsonl"))
    options = parser.parse_args()
    print(campaign(options.faults, options.seed, options.to))
