"""Does naive mixing hurt MAE, and does MixedAE help it? The questions of arXiv 2303.17152, at a small size.

  python studies/mixing/study.py --workers=2   (40 minutes on two cores; resumes after an interruption)

MAE, naive mixing (global attention, no contrast, no segments) and MixedAE are pre-trained on the quickstart's letters
(configs/quickstart.py, 3,000 steps), with the same number of images. `mae, longer` has MixedAE's training time instead:
its steps are MAE's times the ratio of their seconds per step, measured first, alternating, alone, on the cores of one
worker. An encoder is judged by a linear layer on its frozen features, fitted to 780 labeled images and read on 780 test
images, in other fonts and on other parts of photographs.

All arms have the learning rate that was chosen for MAE, and no other was tried, so that the comparison favors MAE. The
paper judges by fine-tuning, and by detection and segmentation, which nothing here says a word about.

As a manipulation check, MAE must be ten points above its own start: if it is not after three seeds, pre-training has
nothing to give to this measure, and the study ends without a verdict. Verdicts are those of studies/verdicts.py; that
two points matter is our choice. Homology of tokens is reported before and after training.

All values are our choice. One JSON line per cell is in studies/mixing/results.jsonl, the table in results.md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mae_jax import recipe
from mae_jax.commands.bench.timed_step import TimedStep
from mae_jax.config import default

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what the studies share
import cells as shared
from cells import Cell, matches, text
from verdicts import MIN_SEEDS, Comparison, judge, outlook
from verdicts import table as verdict_table

RESULTS = Path(__file__).parent / "results.jsonl"
SEEDS, PILOT_SEEDS = tuple(range(MIN_SEEDS)), 3  # seeds before the manipulation check is looked at
ARMS: dict[str, dict[str, Any] | None] = {  # arm → fields of MixedAE; None: MAE
    "mae": None, "naive": {"attention": "all", "contrast_weight": 0.0, "segments": False}, "mixedae": {}}
LONGER = "mae, longer"
STEPS = 3000
GAIN = 0.1  # of top-1: what MAE must give
MARGIN = 0.02  # of top-1: the smallest difference that matters
QUESTIONS = {"MAE above naive mixing": ("mae", "naive"), "MixedAE above MAE": ("mixedae", "mae"),
             "MixedAE above MAE of the same time": ("mixedae", LONGER),
             "MixedAE above naive mixing": ("mixedae", "naive")}
HOMOLOGY = "purity", "neighbour_homology"
KEPT = {"linear": "linear/top1", **{name: name for name in HOMOLOGY}}  # of a cell → metric


def pretraining(cell: Cell) -> ConfigDict:
    """Returns the config of a pre-training: the quickstart's but for method and length."""
    base, fields = recipe("quickstart"), ARMS.get(cell["arm"])
    config = default("mae" if fields is None else "mixedae")
    config.seed, config.batch_size = cell["seed"], base.batch_size
    for part in ("data", "model", "optim", "eval", "log", "train", "checkpoint"):
        config[part].update(base[part])
    config.method.update({name: base.method[name] for name in ("target", "decoder_width", "decoder_depth",
                                                               "decoder_heads")}, **(fields or {}))
    steps = cell.get("steps", STEPS)
    config.train.duration = config.checkpoint.every = f"{steps} steps"
    config.eval.every = f"{steps // 2} steps"  # the first is before training
    config.log.tensorboard = False
    return config.lock()


def plan(cells: list[Cell]) -> Iterator[list[Cell]]:
    """Yields the stages: MAE's first seeds, which the manipulation check takes, then all others."""
    yield [{"kind": "timed"}]
    steps = {LONGER: {"steps": longer(cells)}}
    others = (*(arm for arm in ARMS if arm != "mae"), LONGER)
    for number, (seeds, arms) in enumerate(((SEEDS[:PILOT_SEEDS], ("mae",)), (SEEDS[:PILOT_SEEDS], others),
                                            (SEEDS[PILOT_SEEDS:], ("mae", *others)))):
        if not number or passed(cells):
            yield [{"kind": "pretrained", "arm": arm, "seed": seed, **steps.get(arm, {})}
                   for seed in seeds for arm in arms]


def longer(cells: list[Cell]) -> int:
    """Returns the steps of MAE that take as long as MixedAE's."""
    [times] = [cell["ms"] for cell in cells if cell["kind"] == "timed"]
    return round(STEPS * times["mixedae"] / times["mae"])


def run(cell: Cell, work: Path) -> Cell:
    """Trains a cell and returns it with what was measured before training and after it."""
    begun = time.process_time()
    if cell["kind"] == "timed":
        return {**cell, "ms": timed(), "device": jax.devices()[0].device_kind}
    folder = work / f"{cell['arm'].replace(', ', '_')}_{cell['seed']}"
    shared.trained(pretraining(cell), folder, work)  # if it is not there
    ends = {"first": shared.first_values(folder), "last": shared.last_values(folder)}
    found = {name: {when: values[f"eval/{key}"] for when, values in ends.items()}
             for name, key in KEPT.items() if f"eval/{key}" in ends["last"]}
    return {**cell, **found, "cpu_seconds": round(time.process_time() - begun, 1)}


def timed() -> dict[str, float]:
    """Returns the milliseconds of each arm's train step: the median of alternating rounds of half a second."""
    arms = {arm: TimedStep(pretraining({"arm": arm, "seed": 0})) for arm in ARMS}
    rounds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(8):
        for arm, step in arms.items():
            began, steps = time.perf_counter(), 0
            while (seconds := time.perf_counter() - began) < 0.5:
                step.run(step.batch)
                steps += 1
            rounds[arm].append(seconds / steps)
    return {arm: round(1e3 * statistics.median(times[1:]), 3) for arm, times in rounds.items()}  # the first warms up


def of(cells: list[Cell], arm: str) -> list[Cell]:
    """Returns the runs of an arm."""
    return [cell for cell in cells if matches(cell, {"kind": "pretrained", "arm": arm})]


def probes(cells: list[Cell], arm: str, when: str = "last") -> dict[int, float]:
    """Returns seed → the linear probe's top-1 of an arm, before training ('first') or after it ('last')."""
    return {cell["seed"]: cell["linear"][when] for cell in of(cells, arm)}


def passed(cells: list[Cell]) -> bool:
    """Says whether MAE is above its own start by GAIN, in the mean of the seeds that are there."""
    before, after = (probes(cells, "mae", when) for when in ("first", "last"))
    return shared.mean_gain(after, before) >= GAIN


def comparisons(cells: list[Cell]) -> list[Comparison]:
    """Returns what is asked."""
    return [Comparison(claim, probes(cells, higher), probes(cells, lower), MARGIN, passed(cells))
            for claim, (higher, lower) in QUESTIONS.items()]


def table(cells: list[Cell]) -> str:
    """Returns the Markdown: top-1, the manipulation check, homology, and verdicts."""
    times = next((cell["ms"] for cell in cells if cell["kind"] == "timed"), {})
    lines = ["Top-1 of a linear probe on test images, before training and after it; mean (range) of seeds.", "",
             "| pre-trained with | step time / MAE's | seeds | before | after |", "|---" * 5 + "|"]
    for arm in (*ARMS, LONGER):
        before, after = ([*probes(cells, arm, when).values()] for when in ("first", "last"))
        lines.append(f"| {arm} | {text([times[arm] / times['mae']] if arm in times else [], 2)} | {len(after)} | "
                     f"{text(before)} | {text(after)} |")
    lines += ["", f"Manipulation check: MAE is {GAIN:g} above its own start: {'yes' if passed(cells) else 'no'}.", ""]
    for arm in ("naive", "mixedae"):
        for name in HOMOLOGY:
            if values := [cell[name] for cell in of(cells, arm) if name in cell]:
                before, after = (text([each[when] for each in values], 2) for when in ("first", "last"))
                lines.append(f"- {arm}: {name.replace('_', ' ')} {before} before training, {after} after")
    findings = judge(comparisons(cells))
    lines += ["", verdict_table(findings), "", *outlook(findings, PILOT_SEEDS, len(SEEDS))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/mixing"), help="what is pre-trained")
    parser.add_argument("--hours", type=float, default=0.0, help="begin no cell after so many hours; 0: no limit")
    parser.add_argument("--workers", type=shared.positive, default=1, help="cells at once; --work must be kept")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    cells = shared.read(RESULTS)
    stages = shared.limited(plan(cells), cells, hours=options.hours, at_once=options.workers)
    shared.go_on(RESULTS, cells, stages, partial(run, work=options.work),
                 lambda: RESULTS.with_suffix(".md").write_text(table(cells)), options.workers)
    print(table(cells))


if __name__ == "__main__":
    main()
