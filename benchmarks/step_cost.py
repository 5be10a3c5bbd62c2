"""Compares versions of the train step, each in its own process, alternating step by step.

  git worktree add ../before HEAD~1
  python benchmarks/step_cost.py before=../before now=. --rounds=15
  python benchmarks/step_cost.py default=.,MALLOC_CHECK_=0 kept=. --config=configs/detect.py:digits

Each version is a checkout of this repository, with optional environment variables; one that begins with MALLOC_ leaves
glibc's allocator as it is, where else it keeps what is freed, as all commands do. The step is ViT-B/16's, or that of
--config; flags --config.FIELD=VALUE change it. Ratios compare the first version with each other one: above 1 is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = """
import json, os, resource, sys, time
try:
    from mae_jax.runtime.memory import keep_freed
    keep_freed(os.environ)
except ImportError:  # a version that has no such function
    pass
from absl import flags
from mae_jax.commands import cli
from mae_jax.commands.bench.timed_step import TimedStep
config = cli.define_config()
flags.FLAGS([sys.argv[0], "--config=configs/vit_b_mae.py:repo", *sys.argv[1:]])  # of two --config the last counts
timed = TimedStep(config.value)
memory = timed.step.memory_analysis().temp_size_in_bytes / 2**30
print(json.dumps({"compile_seconds": timed.compile_seconds, "temp_gib": memory}), flush=True)
for _ in sys.stdin:
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    timed.run(timed.batch)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"wall": seconds, "cpu": cpu, "system": after.ru_stime - before.ru_stime,
                      "faults": after.ru_minflt - before.ru_minflt}), flush=True)
"""


class Version:
    """A process that holds one version's compiled step and takes a step when asked."""

    def __init__(self, text: str, arguments: list[str]):
        self.name, rest = text.split("=", 1)
        path, *variables = rest.split(",")
        environment = os.environ | dict(variable.split("=", 1) for variable in variables)
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, *arguments], cwd=path, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.compiled = json.loads(self.process.stdout.readline())
        self.steps: list[dict[str, float]] = []
        self.step()  # the first one also touches all memory
        self.steps.clear()

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(json.loads(self.process.stdout.readline()))

    def figures(self) -> dict[str, Any]:
        """Returns median and least of each figure over the steps: seconds, or counts of page faults."""
        keys = self.steps[0]
        return self.compiled | {key: {"median": statistics.median(step[key] for step in self.steps),
                                      "min": min(step[key] for step in self.steps)} for key in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", help="name=checkout[,VARIABLE=value...]")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--to", type=Path, help="JSON file to write as well")
    options, arguments = parser.parse_known_args()
    versions = [Version(text, arguments or ["--config.batch_size=8"]) for text in options.versions]
    for _ in range(options.rounds):
        for version in versions:
            version.step()
    results = {version.name: version.figures() for version in versions}
    first = results[versions[0].name]
    print(f"load {os.getloadavg()[0]:.1f}\n{'version':<16}{'wall s: median (min)':>22}{'CPU s: median (min)':>22}"
          f"{'of it system':>14}{'faults':>9}{'temp GiB':>10}{'wall':>7}{'(min)':>7}{'CPU':>6}{'(min)':>7}")
    for name, row in results.items():
        ratios = [first[key][what] / row[key][what] for key in ("wall", "cpu") for what in ("median", "min")]
        wall, cpu = (f"{row[key]['median']:.3f} ({row[key]['min']:.3f})" for key in ("wall", "cpu"))
        print(f"{name:<16}{wall:>22}{cpu:>22}{row['system']['median']:>14.3f}{row['faults']['median']:>9.0f}"
              f"{row['temp_gib']:>10.2f}{ratios[0]:>7.3f}{ratios[1]:>7.3f}{ratios[2]:>6.2f}{ratios[3]:>7.3f}")
    if options.to:
        options.to.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
