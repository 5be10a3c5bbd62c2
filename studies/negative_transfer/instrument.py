"""Why do the experts of a small MoCE hardly move: their place, the rate, the steps, or the gate?

  scripts/fetch_fashion_mnist.sh runs/fashion_mnist && scripts/fetch_emoji.sh runs/emoji
  python studies/negative_transfer/instrument.py --fashion=runs/fashion_mnist --emoji=runs/emoji
                                                                         (resumes after an interruption)

A narrow MAE is trained on four domains (domains.py), which it then clusters. Mixtures go on from it, each with one
change of the proportions that a former study had (`before`): experts in the last two odd blocks, half of the first
training's rate, 0.4 of its steps, and gates that start undecided under noise. `all changes` has all of them. Each
mixture is measured by how far its experts went from the MLP that they are copies of, and from each other; and by what
the voted path of a domain is worth beside others, which is what MoCE lives by: the accuracy of a linear probe, and
the error of reconstructing the domain's images. Differences are means over the four domains.

Two seeds have run, with 760 test images of each domain, the first of those that domains.py has now: this describes an
instrument, and gives no verdict. All values are our choice. One JSON line per cell is in
studies/negative_transfer/instrument.jsonl, the table in instrument.md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # of mixtures.py and domains.py
sys.path.insert(0, str(Path(__file__).parents[1]))  # of what the studies share
import cells as shared
import mixtures
from cells import Cell, matches, text
from domains import CLASSES
from mixtures import CHANGED, SHARP, Mixture

RESULTS = Path(__file__).parent / "instrument.jsonl"
SEEDS = 0, 1
FIRST_STEPS = 4800  # of the first training, a third of the study's

VARIANTS = {
    "before": Mixture(), "experts in all odd blocks": Mixture("1,3,5"), "experts in all blocks": Mixture("all"),
    "four times the rate": Mixture(rate=4e-2), "2.5 times the steps": Mixture(steps=4800),
    "gates decided at the start": Mixture(gate=SHARP), "all changes": CHANGED}


FOUND = """**Why experts hardly moved, and what it would have helped.** Of the four changes, a higher rate and more
steps move experts; where they are and how their gates start changes little. Yet experts had specialized all along:
even without any change, a domain's voted path reconstructs its images with less error than other paths do, and with
all changes the difference is larger. The probe hardly sees it: it fits a layer of its own to the features of each
path, and finds less than a point between the voted path and others in the mean of these two seeds, also where the
experts went far. So with this probe the paths of so small a mixture differ by less than the point that was asked.
"""


def plan() -> Iterator[list[Cell]]:
    """Yields the stages."""
    for seed in SEEDS:
        yield [{"kind": "first", "seed": seed}]
        yield [{"kind": "mixture", "seed": seed, "variant": variant} for variant in VARIANTS]


def run(cell: Cell, work: Path) -> Cell:
    """Returns a cell with what was measured; what is trained stays under `work`."""
    begun, file, seed = time.process_time(), work / "domains.npz", cell["seed"]
    first = work / f"first_{seed}"
    shared.trained(mixtures.masked(file, "", seed, FIRST_STEPS), first, work)
    clusters = mixtures.clustered(first, work / f"clusters_{seed}", seed)
    if cell["kind"] == "first":
        found: dict[str, Any] = {
            domain: mixtures.measured(mixtures.load(first), file, domain) for domain in CLASSES}
    else:
        about = VARIANTS[cell["variant"]]
        folder = work / f"{cell['variant'].replace(' ', '_')}_{seed}"
        found = mixtures.mixed(about, seed, file, first, clusters, folder, work, ("vote", "random"))
    return {**cell, **found, "cpu_seconds": round(time.process_time() - begun, 1)}


def table(cells: list[Cell]) -> str:
    """Returns the Markdown."""
    lines = [FOUND, "Mean (range) of seeds. Distances are Frobenius norms of differences of kernels, over that of the "
             "MLP that experts are copies of. `paths`: how many paths the four domains vote for. Both last are means "
             f"over domains, the voted path's less that of {mixtures.RANDOM} others: of the probe's top-1 (above 0 is "
             "better), and of the reconstruction error in percent of theirs (below 0 is better).", "",
             "| mixture | seeds | from the start | from each other | largest gate | paths | probe of the voted path | "
             "its probe | its error, % |", "|---" * 9 + "|"]
    firsts = [cell for cell in cells if cell["kind"] == "first"]
    if firsts:
        whole = [statistics.mean(cell[domain]["probe"] for domain in CLASSES) for cell in firsts]
        lines.append(f"| none: the first training | {len(firsts)} | | | | | {text(whole)} | | |")
    for variant in VARIANTS:
        found = [cell for cell in cells if matches(cell, {"kind": "mixture", "variant": variant})]
        if found:
            keys = ("from_start", "from_each_other", "confidence")
            columns = [text([cell[key] for cell in found], 2) for key in keys]
            counts = [cell["paths"] for cell in found]
            probes = [statistics.mean(each["probe"] for each in cell["vote"].values()) for cell in found]
            lines.append(f"| {variant} | {len(found)} | {' | '.join(columns)} | {text(counts, 1)} | {text(probes)} | "
                         f"{text([*map(gained, found)])} | {text([*map(saved, found)], 2)} |")
    return "\n".join(lines) + "\n"


def gained(cell: Cell) -> float:
    """Returns the probe's accuracy on the voted path less that on others, the mean of domains."""
    return statistics.mean(cell["vote"][domain]["probe"] - cell["random"][domain]["probe"] for domain in CLASSES)


def saved(cell: Cell) -> float:
    """Returns by how many percent the error of the voted path differs from that of others, the mean of domains."""
    return statistics.mean(100 * (cell["vote"][domain]["loss"] / cell["random"][domain]["loss"] - 1)
                           for domain in CLASSES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = mixtures.options(parser)
    cells = shared.read(RESULTS)
    shared.go_on(RESULTS, cells, shared.limited(plan(), cells, hours=options.hours, at_once=options.workers),
                 partial(run, work=options.work), lambda: RESULTS.with_suffix(".md").write_text(table(cells)),
                 options.workers)
    print(table(cells))


if __name__ == "__main__":
    main()
