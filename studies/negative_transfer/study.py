"""Does one masked autoencoder of all domains transfer worse than one of each, and does MoCE help? (arXiv 2402.05382)

  scripts/fetch_fashion_mnist.sh runs/fashion_mnist && scripts/fetch_emoji.sh runs/emoji
  python studies/negative_transfer/study.py --fashion=runs/fashion_mnist --emoji=runs/emoji --workers=2
                                                     (hours of two cores; resumes after an interruption)

The domains are clothes, letters, emoji and photographs (domains.py). A narrow MAE is trained on one of them (`alone`),
or on all four for four times the steps (`all`): a task's encoder saw as many images of its own domain in both. Both
then train for a third as long again (`longer`), as the mixture does that starts from `all` (`MoCE`: 4 experts in all
odd blocks, 16 clusters, at the rate that moves experts most). From the mixture each domain takes the path of most votes
(`vote`), the best one by a probe of held-out training images (`probe`), or, as a control, the mean of three paths other
than the voted one (`random`). All are judged by logistic regression on frozen features, in the mean of the four tasks.
The first training has the quickstart's rate; `longer` has the better of two, the mixture's among them, by the held-out
tenth of each domain's training images and seed 0.

Two manipulation checks, in the mean of seeds, of which three decide whether the study goes on: `all` must be five
points above an untrained encoder, or nothing is judged; and the voted path must be a point above others, or the
experts differ too little for this measure, and no claim about MoCE is judged. If it is not after three seeds, no other
mixture is trained: two seeds of instrument.py, with the same mixture after a shorter first training, had 0.6 and 0.8
points. Verdicts are those of studies/verdicts.py; that a point matters is our choice, as are all values.

The study was begun with a first training of 4,800 steps and 760 test images of each domain. After three seeds `all` was
4.2 points above an untrained encoder, so it ended. Its length was then chosen anew on held-out training images, with
seed 0: `all` is 4.1 points above after 4,800 steps, 6.9 after 14,400. All this is in tried.jsonl.

One JSON line per cell is in studies/negative_transfer/results.jsonl, the table in results.md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # of mixtures.py and domains.py
sys.path.insert(0, str(Path(__file__).parents[1]))  # of what the studies share
import cells as shared
import mixtures
from cells import Cell, matches, text
from domains import CLASSES
from mixtures import CHANGED, FIRST_STEPS
from verdicts import MIN_SEEDS, Comparison, judge, outlook
from verdicts import table as verdict_table

RESULTS = Path(__file__).parent / "results.jsonl"
SEEDS, PILOT_SEEDS = tuple(range(MIN_SEEDS)), 3  # seeds before the manipulation checks are looked at
UNTRAINED, ALL, ALONE, ALL_LONGER, ALONE_LONGER = "untrained", "all", "alone", "all, longer", "alone, longer"
MOCE = "MoCE"
WAYS = "vote", "probe", "random"  # to choose a path
PATHS = VOTED, PROBED, RANDOM = tuple(f"{MOCE}, {how}" for how in WAYS)
FIRSTS = {ALL_LONGER: ALL, ALONE_LONGER: ALONE}  # arm → what it goes on from
RATES = CHANGED.rate / 4, CHANGED.rate  # per 256 images, of what goes on from a first training
GAIN, DIFFERENCE = 0.05, 0.01  # of top-1: what training must give, and how far paths must differ
MARGIN = 0.01  # of top-1: the smallest difference that matters
QUESTIONS = {"one domain alone above all": (ALONE, ALL),
             "one domain alone above all, both longer": (ALONE_LONGER, ALL_LONGER),
             "MoCE's voted path above all, longer": (VOTED, ALL_LONGER),
             "MoCE's voted path above one domain alone, longer": (VOTED, ALONE_LONGER)}


def plan(cells: list[Cell]) -> Iterator[list[Cell]]:
    """Yields the stages: three seeds of every arm, then the others, of what can be judged."""
    pilots, others = SEEDS[:PILOT_SEEDS], SEEDS[PILOT_SEEDS:]
    yield [{"arm": UNTRAINED, "seed": seed} for seed in SEEDS]
    yield arms(pilots, ALL, ALONE)
    if not learns(shared.of_seeds(cells, pilots)):
        return
    yield [cell | {"kind": "pilot", "lr": lr} for lr in RATES for cell in arms((0,), ALL_LONGER, ALONE_LONGER)]
    rates = {arm: rate(cells, arm) for arm in FIRSTS}
    yield arms(pilots, ALL_LONGER, ALONE_LONGER, rates)
    yield [{"arm": MOCE, "seed": seed} for seed in pilots]
    yield arms(others, ALL, ALONE)
    yield arms(others, ALL_LONGER, ALONE_LONGER, rates)
    if differ(shared.of_seeds(cells, pilots)):
        yield [{"arm": MOCE, "seed": seed} for seed in others]


def arms(seeds: tuple[int, ...], all_domains: str, one: str, rates: dict[str, float] | None = None) -> list[Cell]:
    """Returns the cells of dense encoders, the longest first."""
    cells = [{"arm": all_domains, "seed": seed} for seed in seeds] + [
        {"arm": one, "domain": domain, "seed": seed} for seed in seeds for domain in CLASSES]
    return [cell | {"lr": rates[cell["arm"]]} for cell in cells] if rates else cells


def rate(cells: list[Cell], arm: str) -> float:
    """Returns the rate of the best mean over domains of what the pilots had on held-out training images."""
    tried = [cell for cell in cells if matches(cell, {"kind": "pilot", "arm": arm})]
    return max(RATES, key=lambda lr: sum(cell["val"] for cell in tried if cell["lr"] == lr))


def run(cell: Cell, work: Path) -> Cell:
    """Returns a cell with domain → what its encoder is worth there; what is trained stays under `work`."""
    begun, file, seed = time.process_time(), work / "domains.npz", cell["seed"]
    mine = [cell["domain"]] if "domain" in cell else [*CLASSES]
    if cell["arm"] == UNTRAINED:
        params = mixtures.untrained(seed)
        found = {domain: mixtures.measured(params, file, domain) for domain in mine}
    elif cell["arm"] == MOCE:
        first = dense({"arm": ALL, "seed": seed}, work)
        clusters = mixtures.clustered(first, work / f"clusters_of_{first.name}", seed)
        found = mixtures.mixed(CHANGED, seed, file, first, clusters, work / f"moce_{seed}", work, WAYS)
    else:
        params = mixtures.load(dense(cell, work))
        if cell.get("kind") == "pilot":
            found = {"val": statistics.mean(mixtures.held_out(params, file, domain) for domain in mine)}
        else:
            found = {domain: mixtures.measured(params, file, domain) for domain in mine}
    return {**cell, **found, "cpu_seconds": round(time.process_time() - begun, 1)}


def dense(cell: Cell, work: Path) -> Path:
    """Trains a MAE, if it is not there, and first what it goes on from. Returns its folder."""
    arm, domain = cell["arm"], cell.get("domain", "")
    first = dense({**cell, "arm": FIRSTS[arm]}, work) if arm in FIRSTS else None
    steps, lr = (CHANGED.steps, cell["lr"]) if first else (FIRST_STEPS, mixtures.RATE)
    folder = work / "_".join(filter(None, [arm.replace(", ", "_"), domain, f"{lr:g}", str(cell["seed"])]))
    steps = steps // len(CLASSES) if domain else steps
    config = mixtures.masked(work / "domains.npz", domain, cell["seed"], steps, lr, str(first or ""))
    shared.trained(config, folder, work)
    return folder


def figures(cells: list[Cell], arm: str, domain: str, measure: str = "probe") -> dict[int, float]:
    """Returns seed → a measure of an arm's encoder on a domain's test images, which pilots do not have."""
    if arm in PATHS:
        return {cell["seed"]: cell[WAYS[PATHS.index(arm)]][domain][measure] for cell in cells if cell["arm"] == MOCE}
    return {cell["seed"]: cell[domain][measure] for cell in cells if cell["arm"] == arm and domain in cell}


def means(cells: list[Cell], arm: str) -> dict[int, float]:
    """Returns seed → an arm's top-1, the mean of all tasks; of seeds that have all."""
    tasks = [figures(cells, arm, domain) for domain in CLASSES]
    seeds = sorted(set.intersection(*map(set, tasks)))
    return {seed: statistics.mean(task[seed] for task in tasks) for seed in seeds}


def above(cells: list[Cell], higher: str, lower: str) -> float:
    """Returns by how much an arm is above another, in the mean of seeds."""
    return shared.mean_gain(means(cells, higher), means(cells, lower))


def learns(cells: list[Cell]) -> bool:
    """Says whether training on all domains gives this measure something."""
    return above(cells, ALL, UNTRAINED) >= GAIN


def differ(cells: list[Cell]) -> bool:
    """Says whether this measure tells the voted paths from others."""
    return above(cells, VOTED, RANDOM) >= DIFFERENCE


def comparisons(cells: list[Cell]) -> list[Comparison]:
    """Returns what is asked."""
    return [Comparison(claim, means(cells, higher), means(cells, lower), MARGIN,
                       learns(cells) and (higher not in PATHS or differ(cells)))
            for claim, (higher, lower) in QUESTIONS.items()]


def table(cells: list[Cell]) -> str:
    """Returns the Markdown: top-1 by domain, the manipulation checks, what became of experts, and verdicts."""
    lines = ["Top-1 of logistic regression on frozen features of test images; mean (range) of seeds.", "",
             f"| encoder | seeds | {' | '.join(CLASSES)} | mean |", "|---" * (3 + len(CLASSES)) + "|"]
    for arm in (UNTRAINED, ALONE, ALL, ALONE_LONGER, ALL_LONGER, *PATHS):
        whole = means(cells, arm)
        columns = [text([*figures(cells, arm, domain).values()]) for domain in CLASSES]
        lines.append(f"| {arm} | {len(whole)} | {' | '.join(columns)} | {text([*whole.values()])} |")
    lines += ["", f"Manipulation checks: `all` is {GAIN:g} above the untrained encoder: "
              f"{'yes' if learns(cells) else 'no'} ({above(cells, ALL, UNTRAINED):+.3f}). The voted path is "
              f"{DIFFERENCE:g} above others: {'yes' if differ(cells) else 'no'} ({above(cells, VOTED, RANDOM):+.3f}).",
              "", *experts(cells)]
    findings = judge(comparisons(cells))
    lines += [verdict_table(findings), "", *outlook(findings, PILOT_SEEDS, len(SEEDS))]
    return "\n".join(lines) + "\n"


def experts(cells: list[Cell]) -> list[str]:
    """Says how far experts went, and what their paths reconstruct."""
    if not (found := [cell for cell in cells if matches(cell, {"arm": MOCE})]):
        return []
    start, apart, paths = (text([cell[key] for cell in found], 2) for key in ("from_start", "from_each_other", "paths"))
    lower = [100 * (1 - figures(cells, VOTED, domain, "loss")[seed] / figures(cells, RANDOM, domain, "loss")[seed])
             for domain in CLASSES for seed in means(cells, VOTED)]
    return [f"Experts are {start} of their MLP's norm from where they began and {apart} from each other; the four "
            f"domains vote for {paths} paths. The voted path reconstructs masked patches of its domain's test images "
            f"with {statistics.mean(lower):.1f} % less error than other paths.", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = mixtures.options(parser)
    cells = shared.read(RESULTS)
    stages = shared.limited(plan(cells), cells, hours=options.hours, at_once=options.workers)
    shared.go_on(RESULTS, cells, stages, partial(run, work=options.work),
                 lambda: RESULTS.with_suffix(".md").write_text(table(cells)), options.workers)
    print(table(cells))


if __name__ == "__main__":
    main()
