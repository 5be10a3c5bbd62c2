"""Does the quickstart learn? Three seeds; probes of raw pixels, of the untrained and of the trained encoder.

  python studies/quickstart/study.py            (about 15 minutes on 2 cores; goes on where it was stopped)

One JSON line per seed in studies/quickstart/results.jsonl, the table in studies/quickstart/results.md.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parent / "results.jsonl"
ROWS = {  # title: (metric before training, metric after training)
    "linear probe, raw pixels": ("eval/linear/pixels_top1", None),
    "linear probe, untrained and trained encoder": ("eval/linear/top1", "eval/linear/top1"),
    "k-NN, raw pixels": ("eval/knn/pixels_top1", None),
    "k-NN, untrained and trained encoder": ("eval/knn/top1", "eval/knn/top1"),
    "held-out error of hidden patches": ("eval/loss", "eval/loss"),
    "the same, mean colour of the visible patches": ("eval/mean_colour_loss", None),
}


def train(seed: int) -> dict[str, float]:
    """Runs the quickstart with a seed and returns the evaluations before and after, and the training speed."""
    with tempfile.TemporaryDirectory() as workdir:
        subprocess.run([sys.executable, "-m", "mae_jax.main", "--config=configs/quickstart.py",
                        f"--workdir={workdir}", f"--config.seed={seed}", "--config.log.tensorboard=False"], check=True)
        lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval/loss" in line]
    speeds = [line["train/images_per_sec"] for line in lines if "train/images_per_sec" in line]
    return {"seed": seed, "before": evaluations[0], "after": evaluations[-1],
            "seconds": lines[-1]["time"] - lines[0]["time"], "images_per_sec": statistics.median(speeds)}


def table(cells: list[dict]) -> str:
    """Returns the Markdown table: mean and range over the seeds."""
    def text(values: list[float]) -> str:
        return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    lines = [f"| mean (range) of {len(cells)} seeds | before training | after {cells[0]['after']['step']} steps |",
             "|---|---|---|"]
    for title, (before, after) in ROWS.items():
        first = text([cell["before"][before] for cell in cells])
        last = text([cell["after"][after] for cell in cells]) if after else ""
        lines.append(f"| {title} | {first} | {last} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    cells = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for seed in SEEDS:
        if all(cell["seed"] != seed for cell in cells):
            cells.append(train(seed))
            with open(RESULTS, "a") as file:
                file.write(json.dumps(cells[-1]) + "\n")
    RESULTS.with_suffix(".md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
