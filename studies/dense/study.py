"""Does MAE pre-training on the same images improve detection and segmentation?

  python studies/dense/study.py                       (hours on two cores; resumes after an interruption)
  python studies/dense/study.py --cells=3             (so many more cells; --hours=1: cells that begin within an hour)
  python studies/dense/study.py --steps=4             (a trial of every kind of cell, with results in --work)

Two tasks on images that need no download (the extra `demo`): Mask R-CNN on digit_scenes (configs/detect.py, smaller)
and UperNet on photo_mosaic (configs/upernet.py, the protocol without relative positions). Each task has three arms with
equal steps: `scratch`, an encoder from random weights; `mae`, from a MAE pre-trained on the same images without their
labels; `frozen`, a frozen encoder of random weights with a trained head. There are eight seeds, each with its own
pre-training. Each arm chooses its learning rate from the same few with a run of seed 0, on a held-out tenth of the
training split; all other runs train on the whole split and read the test split once, with their last weights. No arm
has layer-wise decay. All sizes, steps, rates, floors, ceilings and differences that matter are our choice.

The MAE of detection predicts patches normalized one by one, at a rate of 6e-3: of four variants (patches.py) it tells
most of the digits on frozen patches. It replaced a MAE of pixels at 2e-2 after five seeds of that had read the test
split: box AP 0.03 to 0.17, with `scratch` at 0.09 to 0.20. Of its tokens 96 % of the squared norm is one vector that
all share; that this is why was not tested. What was tried besides is in cells of the kind `tried`.

As a manipulation check, `scratch` must lie between a floor and a ceiling of each measure, and in the mean of seeds
above `frozen` by what matters: otherwise the measure does not read the encoder. If no measure of a task passes after
three seeds, the task's other seeds are not run. Verdicts are those of studies/verdicts.py, corrected for all
comparisons. The second part of the check is younger than the seeds of segmentation, which fails it.

Of the rates, frozen encoders chose the highest, of both tasks: a still higher one may suit them better.

One JSON line per cell is in studies/dense/results_cpu.jsonl, the tables in .md.
"""

import argparse
import functools
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mae_jax import recipe
from mae_jax.config import default

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what the studies share
import cells as shared
from cells import Cell, matches, text
from verdicts import MIN_SEEDS, Comparison, judge, outlook
from verdicts import table as verdict_table

RESULTS = Path(__file__).parent / "results_cpu.jsonl"
SEEDS, PILOT_SEEDS = tuple(range(MIN_SEEDS)), 3  # seeds before futility is looked at
SCRATCH, MAE, FROZEN = ARMS = "scratch", "mae", "frozen"
CLAIMS = (MAE, SCRATCH), (MAE, FROZEN)  # the first above the second
HELD = 10  # percent of the training split, which choose the rates


class Measure(NamedTuple):
    """A figure of the test split."""

    key: str
    margin: float  # the smallest difference that matters
    floor: float  # what training from scratch must exceed
    ceiling: float  # and stay below


class Task(NamedTuple):
    """What an encoder is judged by."""

    recipe: str
    fields: dict[str, Any]  # of the recipe, besides those of an arm
    steps: int
    pretraining: int  # steps of the MAE
    rates: tuple[float, ...]
    chooses: str  # metric of the part held out
    measures: dict[str, Measure]
    mae: dict[str, Any]  # fields of the MAE


TASKS = {  # the quicker one first
    "segmentation": Task(
        "upernet:xcit,mosaic", {"model.width": 96, "model.depth": 4, "model.heads": 3, "optim.warmup": "30 steps"},
        300, 2400, (0.016, 0.032, 0.064, 0.128), "val/own_size/miou",
        {"mIoU": Measure("eval/own_size/miou", 0.02, 0.1, 0.9)},
        {"method.target": "pixel", "optim.lr": 2e-2}),
    "detection": Task(
        "detect:digits", {
            "model.width": 96, "model.depth": 4, "method.map_blocks": (1, 2, 3), "method.channels": 32,
            "method.candidates": (128, 128), "method.proposals": (64, 64), "method.regions": 24,
            "method.box_width": 128, "method.mask_convs": 1, "optim.warmup": "40 steps"},
        800, 2400, (0.008, 0.016, 0.032, 0.064), "val/box_ap",
        {"box AP": Measure("eval/box_ap", 0.02, 0.05, 0.8), "mask AP": Measure("eval/mask_ap", 0.02, 0.02, 0.8)},
        {"method.target": "norm_pix", "optim.lr": 6e-3}),
}


def common(config: ConfigDict, cell: Cell, steps: int, held: bool) -> ConfigDict:
    """Sets the seed, the duration and the splits: a part is held out to choose by, or all is learned from."""
    config.seed = cell["seed"]
    config.data.train_split = f"train[:{100 - HELD}%]" if held else "train"
    config.data.val_split = f"train[{100 - HELD}%:]" if held else ""
    config.train.duration = config.checkpoint.every = config.eval.every = f"{steps} steps"
    config.log.update(every="20 steps", tensorboard=False)
    config.eval.test = not held
    return config


def pretraining(cell: Cell, steps: int) -> ConfigDict:
    """Returns the config of a MAE on the images of a task, of the shape of its encoder."""
    task, config = TASKS[cell["task"]], default("mae")
    about = recipe(task.recipe, task.fields)
    config.batch_size = 16  # many steps of few images, as in configs/quickstart.py
    config.data.update(source=about.data.source, image_size=about.data.image_size, crop_scale=(0.4, 1.0))
    config.model.update({name: about.model[name] for name in ("width", "depth", "heads", "patch")})
    config.method.update(decoder_width=64, decoder_depth=1, decoder_heads=2)
    config.optim.update(betas=(0.9, 0.98), warmup=f"{steps // 20} steps")  # as configs/quickstart.py
    config.update_from_flattened_dict(task.mae)
    common(config, cell, steps, held=False)
    config.eval.update(test=False)
    return config.lock()


def training(cell: Cell, steps: int, encoder: str) -> ConfigDict:
    """Returns the config of an arm; `encoder`: the workdir of a MAE, for the arm that begins with it."""
    task = TASKS[cell["task"]]
    config = recipe(task.recipe, {
        **task.fields, "model.drop_path": 0.0, "model.auto": (), "optim.lr": cell["lr"],
        "optim.layer_decay": 1.0, "method.train_blocks": 0 if cell["arm"] == FROZEN else -1,
        "init_from": encoder if cell["arm"] == MAE else ""})
    common(config, cell, steps, held=cell["kind"] == "pilot")
    return config.lock()


def plan(cells: list[Cell]) -> Iterator[list[Cell]]:
    """Yields stages of cells that need nothing of one another; a task that cannot be judged ends after three seeds."""
    yield [{"kind": "pretrained", "task": task, "arm": MAE, "seed": 0} for task in TASKS]  # several pilots share them
    yield [{"kind": "pilot", "task": task, "arm": arm, "seed": 0, "lr": lr}
           for task, arm in itertools.product(TASKS, ARMS) for lr in TASKS[task].rates]
    for task, seeds in itertools.product(TASKS, (SEEDS[:PILOT_SEEDS], SEEDS[PILOT_SEEDS:])):
        if not seeds[0] or any(passed(cells, task).values()):
            yield [{"kind": "trained", "task": task, "arm": arm, "seed": seed,
                    "lr": shared.chosen(cells, kind="pilot", task=task, arm=arm)} for seed in seeds for arm in ARMS]


def run(cell: Cell, work: Path, steps: int = 0) -> Cell:
    """Trains a cell and returns it with what was measured; pre-trained encoders stay under `work`, one of each seed."""
    task, begun, cpu = TASKS[cell["task"]], time.monotonic(), cpu_seconds()
    encoder = work / f"mae_{cell['task']}_{cell['seed']}"
    if cell["arm"] == MAE:
        shared.trained(pretraining(cell, steps or task.pretraining), encoder, work)  # if it is not there
    found = {}
    if cell["kind"] != "pretrained":
        last = shared.trained(training(cell, steps or task.steps, str(encoder)), None, work)
        found = {"val": last[task.chooses]} if cell["kind"] == "pilot" else {
            name: last[measure.key] for name, measure in task.measures.items()}
    spent = {"seconds": round(time.monotonic() - begun, 1), "cpu_seconds": round(cpu_seconds() - cpu, 1)}
    return {**cell, **found, **spent}


def cpu_seconds() -> float:
    """Returns the seconds that cores have worked for this process and what it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def values(cells: list[Cell], task: str, arm: str, name: str) -> dict[int, float]:
    """Returns seed → a measure of an arm."""
    found = (cell for cell in cells if matches(cell, {"kind": "trained", "task": task, "arm": arm}))
    return shared.by_seed(found, name)


def passed(cells: list[Cell], task: str) -> dict[str, bool]:
    """Says of each measure whether it reads the encoder, in the mean of the seeds that are there.

    So it is if training from scratch is between floor and ceiling, and above a frozen encoder of random weights by what
    matters.
    """
    found = {}
    for name, measure in TASKS[task].measures.items():
        scratch, frozen = (values(cells, task, arm, name) for arm in (SCRATCH, FROZEN))
        found[name] = shared.mean_gain(scratch, frozen) >= measure.margin and (
            measure.floor < statistics.mean(scratch.values()) < measure.ceiling)
    return found


def comparisons(cells: list[Cell]) -> list[Comparison]:
    """Returns what is asked."""
    return [Comparison(f"{task}, {name}: {higher} above {lower}", values(cells, task, higher, name),
                       values(cells, task, lower, name), measure.margin, passed(cells, task)[name])
            for task, about in TASKS.items() for name, measure in about.measures.items() for higher, lower in CLAIMS]


def table(cells: list[Cell]) -> str:
    """Returns the Markdown: figures, the manipulation check, verdicts, and before all seeds are there the power."""
    lines = ["Of the test split, mean (range) of seeds; `check`: what training from scratch must lie between, how far "
             "above the frozen encoder it must be, and whether it is.", "",
             f"| task | measure | {' | '.join(ARMS)} | check |", "|---" * (3 + len(ARMS)) + "|"]
    for task, about in TASKS.items():
        for name, measure in about.measures.items():
            arms = [text([*values(cells, task, arm, name).values()]) for arm in ARMS]
            known = values(cells, task, SCRATCH, name) and ("yes" if passed(cells, task)[name] else "no")
            check = f"{measure.floor:g} to {measure.ceiling:g}, {measure.margin:g} above: {known or '-'}"
            lines.append(f"| {task} | {name} | {' | '.join(arms)} | {check} |")
    findings = judge(comparisons(cells))
    lines += ["", verdict_table(findings), "", *outlook(findings, PILOT_SEEDS, len(SEEDS))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/dense"), help="where pre-trained encoders stay")
    parser.add_argument("--cells", type=shared.positive, default=0, help="end after so many more cells")
    parser.add_argument("--hours", type=float, default=0.0, help="begin no cell after so many hours")
    parser.add_argument("--workers", type=shared.positive, default=1, help="cells at once; --work must be kept")
    parser.add_argument("--steps", type=shared.positive, default=0, help="so few of each: a trial, results in --work")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / f"trial_{options.steps}.jsonl" if options.steps else RESULTS
    cells = shared.read(results)

    def report() -> None:
        results.with_suffix(".md").write_text(table(cells))

    one = functools.partial(run, work=options.work, steps=options.steps)
    stages = shared.limited(plan(cells), cells, options.cells, options.hours, options.workers)
    shared.go_on(results, cells, stages, one, report, options.workers)
    print(table(cells))


if __name__ == "__main__":
    main()
