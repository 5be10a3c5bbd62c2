"""Does the quickstart learn? Linear probe and k-NN of raw pixels, the untrained and the trained encoder; eight seeds.

  python studies/quickstart/study.py            (resumes after an interruption)

One JSON line per seed is in studies/quickstart/results.jsonl, the table in studies/quickstart/results.md, the runs with
their reconstructions in runs/quickstart_seeds. A seed passes if the linear probe of the trained encoder is at least
MARGIN above both others; the test images are the same for all. Verdicts are those of studies/verdicts.py.
"""

import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what the studies share
from cells import Cell, read
from verdicts import Comparison, judge
from verdicts import table as verdict_table

SEEDS = range(8)
MARGIN = 0.10  # of top-1: what no seed may fall short of, and what matters to the verdicts
RESULTS = Path(__file__).parent / "results.jsonl"
RUNS = Path("runs/quickstart_seeds")
PROBES = {"linear probe": "linear", "k-NN": "knn"}


def train(seed: int) -> Cell:
    """Runs the quickstart with a seed; returns its evaluations before and after, and what they took."""
    workdir = RUNS / str(seed)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "mae_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}",
                    f"--config.seed={seed}", "--config.log.tensorboard=False",
                    f"--config.train.compilation_cache={RUNS / 'compiled'}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval/loss" in line]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seed": seed, "before": evaluations[0], "after": evaluations[-1], "cpu_seconds": round(cpu, 1)}


def three(cell: Cell, probe: str) -> tuple[float, float, float]:
    """Returns top-1 of a probe: of raw pixels, of the untrained encoder, of the trained one."""
    name, before, after = f"eval/{probe}/", cell["before"], cell["after"]
    # Pixels are measured with the last evaluation; the committed cells have them from the first one.
    return (before | after)[f"{name}pixels_top1"], before[f"{name}top1"], after[f"{name}top1"]


def table(cells: list[Cell]) -> str:
    """Returns the Markdown: mean and range over the seeds, the smallest advantage in any of them, and verdicts."""
    def text(values: list[float]) -> str:
        return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    steps = cells[0]["after"]["step"]
    lines = [f"| mean (range) of {len(cells)} seeds | raw pixels | untrained encoder | after {steps} steps | "
             "above the better of both, worst seed |", "|---|---|---|---|---|"]
    for title, probe in PROBES.items():
        figures = [three(cell, probe) for cell in cells]
        margin = min(trained - max(pixels, untrained) for pixels, untrained, trained in figures)
        lines.append(f"| {title}, top-1 | {' | '.join(text(list(each)) for each in zip(*figures, strict=True))} | "
                     f"{margin:+.3f} |")
    plain = [cell["before"]["eval/mean_colour_loss"] for cell in cells]
    error = [[cell[when]["eval/loss"] for cell in cells] for when in ("before", "after")]
    lines.append(f"| error of hidden patches | {text(plain)}: mean color of the visible ones | {text(error[0])} | "
                 f"{text(error[1])} | |")
    passed = sum(three(cell, "linear")[2] - max(three(cell, "linear")[:2]) >= MARGIN for cell in cells)
    cpu = statistics.mean(cell["cpu_seconds"] for cell in cells)
    by_seed = [{cell["seed"]: three(cell, "linear")[k] for cell in cells} for k in range(3)]
    claims = [Comparison(f"linear probe: above {what}", by_seed[2], by_seed[k], MARGIN)
              for k, what in enumerate(("raw pixels", "the untrained encoder"))]
    return "\n".join([*lines, "", f"The linear probe is {MARGIN:.0%} of the images or more above both in {passed} of "
                      f"{len(cells)} seeds. A run took {cpu:.0f} seconds of one core.",
                      "", verdict_table(judge(claims))]) + "\n"


def main() -> None:
    cells = read(RESULTS)
    for seed in SEEDS:
        if all(cell["seed"] != seed for cell in cells):
            cells.append(train(seed))
            with open(RESULTS, "a") as file:
                file.write(json.dumps(cells[-1]) + "\n")
    RESULTS.with_suffix(".md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
