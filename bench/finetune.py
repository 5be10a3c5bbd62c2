"""What is the quickstart's encoder worth? Fine-tuning against training from scratch, probes, and blocks that learn.

  python -m mae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python bench/finetune.py --from=runs/quickstart      (about 2 hours on 2 cores; goes on where it was stopped)

Every arm has the same pictures and epochs, and chooses its learning rate from the same three values, with seed 0 on the
validation part of the training split; three seeds then read the test split, each once, with the last weights. One JSON
line per cell in bench/results/finetune.jsonl, the tables in bench/results/finetune.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LABELS = {"10": "", "50": "labels50", "150": "all"}  # labelled crops per photograph → argument of the recipe
ARMS = ("finetuned", "scratch")
LRS = (4e-3, 2e-2, 1e-1)
PROBE_LRS = (1.2e-2, 3.6e-2, 1.1e-1)
SEEDS = (0, 1, 2)
BLOCKS = (0, 0.5, 1, 2, 4, 6)  # of 6; with 50 labels per photograph
RESULTS = Path(__file__).parent / "results" / "finetune.jsonl"
Cell = dict[str, Any]


def chosen_by_validation(cells: list[Cell], **what: Any) -> float:
    """Returns the learning rate of the best validation accuracy among the cells of an arm; the lower one of two."""
    tried = [cell for cell in cells if cell["part"] == "val" and all(cell[key] == value for key, value in what.items())]
    return max(tried, key=lambda cell: (cell["top1"], -cell["lr"]))["lr"]


def plan(cells: list[Cell]) -> Iterator[Cell]:
    """Yields what is to be run, in order; a cell of the test split needs those of the validation part before it."""
    arms = [{"arm": arm, "labels": labels, "blocks": -1} for labels in LABELS for arm in ARMS]
    arms += [{"arm": "finetuned", "labels": "50", "blocks": blocks} for blocks in BLOCKS[:-1]]
    arms += [{"arm": "untrained", "labels": "50", "blocks": 0}]
    for arm in arms:
        for lr in PROBE_LRS if arm["blocks"] == 0 else LRS:
            yield {**arm, "part": "val", "lr": lr, "seed": 0}
        for seed in SEEDS:
            yield {**arm, "part": "test", "lr": chosen_by_validation(cells, **arm), "seed": seed}


def run(cell: Cell, encoder: str) -> Cell:
    """Trains a cell and returns it with its accuracy."""
    arguments = [LABELS[cell["labels"]], "scratch" if cell["arm"] == "scratch" else "",
                 "probe" if cell["blocks"] == 0 else ""]
    split = "" if cell["part"] == "val" else "test"
    flags = [f"optim.lr={cell['lr']}", f"seed={cell['seed']}", f"method.train_blocks={float(cell['blocks'])}",
             "checkpoint.best=", "eval.every=100000 steps", "checkpoint.every=100000 steps", "log.tensorboard=False"]
    flags += [f"data.eval_split={split}"] + ["data.val_split="] * (cell["part"] == "test")
    flags += [f"init_from={encoder}"] * (cell["arm"] == "finetuned")
    with tempfile.TemporaryDirectory() as workdir:
        config = f"configs/quickstart_finetune.py:{','.join(filter(None, arguments))}"
        subprocess.run([sys.executable, "-m", "mae_jax.main", f"--config={config}", f"--workdir={workdir}",
                        *(f"--config.{flag}" for flag in flags)], check=True)
        lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    figures = [line for line in lines if f"{'val' if cell['part'] == 'val' else 'eval'}/top1" in line][-1]
    top1 = figures["val/top1" if cell["part"] == "val" else "eval/top1"]
    return {**cell, "top1": top1, "steps": figures["step"], "seconds": round(lines[-1]["time"] - lines[0]["time"], 1)}


def tests(cells: list[Cell], **what: Any) -> list[float]:
    """Returns the test accuracies of an arm, one per seed."""
    return [cell["top1"] for cell in cells if cell["part"] == "test"
            and all(cell[key] == value for key, value in what.items())]


def text(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""


def verdict(first: list[float], second: list[float]) -> str:
    """Says whether two arms differ by more than the spread of either: whether their ranges are apart."""
    if not first or not second:
        return ""
    if min(first) > max(second):
        return "better"
    return "worse" if max(first) < min(second) else "not decidable"


def table(cells: list[Cell]) -> str:
    """Returns the Markdown tables: mean and range over the seeds."""
    lines = ["Top-1 on the test crops of 17 photographs: mean (range) of three seeds.", "",
             "| labels per photograph | fine-tuned | from scratch | fine-tuned is |", "|---|---|---|---|"]
    for labels in LABELS:
        tuned, scratch = (tests(cells, arm=arm, labels=labels, blocks=-1) for arm in ARMS)
        lines.append(f"| {labels} | {text(tuned)} | {text(scratch)} | {verdict(tuned, scratch)} |")
    lines += ["", "| blocks that learn (50 labels) | fine-tuned | against all 6 |", "|---|---|---|"]
    whole = tests(cells, arm="finetuned", labels="50", blocks=-1)
    for blocks in BLOCKS:
        found = tests(cells, arm="finetuned", labels="50", blocks=blocks if blocks < 6 else -1)
        lines.append(f"| {blocks} | {text(found)} | {verdict(found, whole) if blocks < 6 else ''} |")
    probe, floor = (tests(cells, arm=arm, labels="50", blocks=0) for arm in ("finetuned", "untrained"))
    lines += ["", f"Linear probe (50 labels): {text(probe)}; of the untrained encoder {text(floor)}: "
                  f"{verdict(probe, floor)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="encoder", default="runs/quickstart", help="workdir of the quickstart")
    encoder = parser.parse_args().encoder
    cells = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for cell in plan(cells):
        if all(any(done[key] != value for key, value in cell.items()) for done in cells):
            cells.append(run(cell, encoder))
            with open(RESULTS, "a") as file:
                file.write(json.dumps(cells[-1]) + "\n")
            RESULTS.with_suffix(".md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
