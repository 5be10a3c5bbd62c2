"""How useful is a small encoder of photographs? Fine-tuning of some or all blocks, training from scratch, and probes.

  python -m mae_jax train --config=folder:laptop --config.data.source=photo_crops --workdir=runs/photographs
  python studies/finetune/study.py --from=runs/photographs      (resumes after an interruption)

Every arm has the same images and 100 steps of 64 (all blocks and none also 300), and chooses its learning rate from the
same three values, with seed 0 on the validation part of the training split; the other seeds then train at that rate. A
cell reads the validation part and the test split with its last weights; only cells at the chosen rate enter the tables.
One JSON line per cell is in studies/finetune/results.jsonl, the tables are in results.md beside it. The probe (no block
is trained) has its own three rates (lines of a fourth, lower one were never chosen), a batch norm before its layer,
fixed positions, and neither label smoothing nor stochastic depth, as published. Verdicts are those of
studies/verdicts.py; that two points matter is our choice. The committed cells have three seeds, too few for a
conclusion; another run adds seeds up to the eight of a verdict.
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

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what the studies share
from cells import Cell, by_seed, matches, read
from verdicts import Comparison, judge
from verdicts import table as verdict_table

LABELS = {"10": "", "50": "labels50", "150": "all"}  # labeled crops per photograph → argument of the recipe
ARMS = ("finetuned", "scratch")
LRS = (4e-3, 2e-2, 1e-1)
PROBE_LRS = (3.6e-2, 1.1e-1, 3.3e-1)
SEEDS = tuple(range(8))
MARGIN = 0.02  # of accuracy: the smallest difference that matters
STEPS, LONGER = 100, 300  # the longer ones for all blocks against none
BLOCKS = (0, 0.5, 1, 2, 4, 6)  # of 6; with 50 labels per photograph
RESULTS = Path(__file__).parent / "results.jsonl"


def chosen_by_validation(cells: list[Cell], **what: Any) -> float:
    """Returns the learning rate of the best validation accuracy among the cells of an arm; the lower one of two."""
    tried = [cell for cell in cells if cell["seed"] == 0 and matches(cell, what)]
    return max(tried, key=lambda cell: (cell["val"], -cell["lr"]))["lr"]


def plan(cells: list[Cell]) -> Iterator[Cell]:
    """Yields what is to be run, in order; the further seeds of an arm need its first."""
    arms = [{"arm": arm, "labels": labels, "blocks": -1, "steps": STEPS} for labels in LABELS for arm in ARMS]
    frozen = {"labels": "50", "blocks": 0, "steps": STEPS}
    arms += [{"arm": "finetuned", **frozen}, {"arm": "untrained", **frozen}]
    arms += [{"arm": "finetuned", "labels": "50", "blocks": blocks, "steps": LONGER} for blocks in (0, -1)]
    arms += [{"arm": "finetuned", "labels": "50", "blocks": blocks, "steps": STEPS} for blocks in BLOCKS[1:-1]]
    for arm in arms:
        for lr in PROBE_LRS if arm["blocks"] == 0 else LRS:
            yield {**arm, "lr": lr, "seed": 0}
        for seed in SEEDS[1:]:
            yield {**arm, "lr": chosen_by_validation(cells, **arm), "seed": seed}


def run(cell: Cell, encoder: str, programs: str) -> Cell:
    """Trains a cell and returns it with its accuracies; compiled programs are kept in the folder `programs`."""
    arguments = [LABELS[cell["labels"]], "scratch" if cell["arm"] == "scratch" else "",
                 "probe" if cell["blocks"] == 0 else ""]
    flags = [f"optim.lr={cell['lr']}", f"seed={cell['seed']}", f"method.train_blocks={float(cell['blocks'])}",
             "checkpoint.best_metric=", "eval.every=100000 steps", "checkpoint.every=100000 steps",
             "log.tensorboard=False", f"train.compilation_cache={programs}", f"train.duration={cell['steps']} steps"]
    flags += [f"init_from={encoder}"] * (cell["arm"] == "finetuned")
    with tempfile.TemporaryDirectory() as workdir:
        config = f"studies/finetune/finetune.py:{','.join(filter(None, arguments))}"
        subprocess.run([sys.executable, "-m", "mae_jax.main", f"--config={config}", f"--workdir={workdir}",
                        *(f"--config.{flag}" for flag in flags)], check=True)
        lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    last = {name: value for line in lines for name, value in line.items()}
    return {**cell, "val": last["val/top1"], "test": last["eval/top1"],
            "seconds": round(lines[-1]["time"] - lines[0]["time"], 1)}


def tests(cells: list[Cell], **what: Any) -> dict[int, float]:
    """Returns seed → test accuracy of an arm at the rate that it chose; of STEPS if nothing is said."""
    arm = [cell for cell in cells if matches(cell, {"steps": STEPS} | what)]
    if not any(cell["seed"] for cell in arm):
        return {}
    rate = chosen_by_validation(arm)
    return by_seed((cell for cell in arm if cell["lr"] == rate), "test")


def text(values: dict[int, float]) -> str:
    mean, low, high = (function(values.values()) if values else 0 for function in (statistics.mean, min, max))
    return f"{mean:.3f} ({low:.3f} to {high:.3f})" if values else ""


def table(cells: list[Cell]) -> str:
    """Returns the Markdown tables: mean and range over the seeds, and the verdicts."""
    def of(blocks: float, arm: str = "finetuned", labels: str = "50", steps: int = STEPS) -> dict[int, float]:
        return tests(cells, arm=arm, labels=labels, blocks=blocks, steps=steps)

    lines = ["Top-1 on the test crops of 17 photographs: mean (range) of seeds.", "",
             "| labels per photograph | fine-tuned | from scratch |", "|---|---|---|"]
    claims = []
    for labels in LABELS:
        tuned, scratch = (of(-1, arm, labels) for arm in ARMS)
        lines.append(f"| {labels} | {text(tuned)} | {text(scratch)} |")
        claims.append(Comparison(f"{labels} labels: fine-tuned above scratch", tuned, scratch, MARGIN))
    lines += ["", "| blocks that learn (50 labels; 0: the probe) | fine-tuned |", "|---|---|"]
    for blocks in BLOCKS:
        found = of(blocks if blocks < 6 else -1)
        lines.append(f"| {blocks} | {text(found)} |")
        if blocks < 6:
            claims.append(Comparison(f"{blocks} of the blocks learn, above all 6", found, of(-1), MARGIN))
    probe, floor, long_probe, whole = of(0), of(0, "untrained"), of(0, steps=LONGER), of(-1, steps=LONGER)
    claims += [Comparison("the probe above the untrained encoder's", probe, floor, MARGIN),
               Comparison(f"after {LONGER} steps: all 6 blocks above the probe", whole, long_probe, MARGIN)]
    lines += ["", f"Linear probe (50 labels): {text(probe)}; of the untrained encoder {text(floor)}.",
              "", f"After {LONGER} steps (50 labels): all 6 blocks {text(whole)}; the probe {text(long_probe)}.",
              "", verdict_table(judge(claims))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="encoder", default="runs/photographs", help="workdir of the first command")
    encoder = parser.parse_args().encoder
    cells = read(RESULTS)
    with tempfile.TemporaryDirectory() as programs:
        for cell in plan(cells):
            if any(matches(done, cell) for done in cells):
                continue
            cells.append(run(cell, encoder, programs))
            with open(RESULTS, "a") as file:
                file.write(json.dumps(cells[-1]) + "\n")
            RESULTS.with_suffix(".md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
