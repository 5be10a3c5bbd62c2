"""Do masked-image methods lose less than DINO with less pre-training data? The question of arXiv 2112.10740.

  scripts/fetch_fashion_mnist.sh runs/fashion_mnist
  python studies/small_data/study.py --fashion=runs/fashion_mnist --workers=2
                         (two hours of two cores to its check, which it failed; eight, roughly, if it passes; resumes
                         after an interruption; --hours=1: one of them)

SplitMask, BEiT, MAE and DINO are pre-trained on the first 58,000, 5,800 or 580 training images of Fashion-MNIST, for
equally many images shown, with a vocabulary of that part alone. Each encoder is then fine-tuned on the labels of the
first 1,000, behind a batch norm, without layer-wise decay (studies/finetune/instrument.py says why), DINO's by its
class token, which it trains, all others by the mean patch, pre-trained ones with stochastic depth. `scratch` starts
from random weights. The last 2,000 training images choose, with seed 0: each method's rate of pre-training, by a
fine-tuning after a quarter of a run on all images, and each arm's rate and steps of fine-tuning. The other seeds train
at these. A cell reads the test split once, with its last weights; only cells of what was chosen enter the tables. Seeds
differ in all random draws, not in the images of a part.

As a manipulation check, on all images and in the mean of seeds: a method must be five points above `scratch`, fine-
tuned, so that it has something to lose, and above k-NN on its own features, so that fine-tuning works. If DINO is not,
after three seeds or after all, the study ends; another method is not judged then. What is judged is the loss from
58,000 to 580 images; 5,800 are of three seeds, to see the way there. Verdicts are those of studies/verdicts.py; that a
point and a half matters is our choice, as are all values. If the differences of losses deviate by one point over
seeds, as the design assumed, eight seeds see a point and a half with a power of 0.83.

The size is what fits into ten hours on two cores: patches of 7 x 7 pixels, 16 of an image, of which BEiT masks 6,
singly, since its blocks have 16; 128,000 images shown, which are two epochs of all and 220 of the least.

One JSON line per cell is in studies/small_data/results.jsonl, the table in results.md.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.config import default
from mae_jax.data.sources.fashion_scenes import FILES, clothes
from mae_jax.errors import GuardError
from mae_jax.evals import knn
from mae_jax.inference.encoder import open_encoder

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what the studies share
import cells as shared
from cells import Cell, matches, text
from verdicts import MIN_SEEDS, Comparison, judge, outlook
from verdicts import table as verdict_table

RESULTS = Path(__file__).parent / "results.jsonl"
SEEDS, PILOT_SEEDS = tuple(range(MIN_SEEDS)), 3  # seeds before the manipulation check is looked at
METHODS, SCRATCH = ("splitmask", "beit", "mae", "dino"), "scratch"
SIDE, LOCAL, PATCH = 28, 14, 7  # pixels of an image, of a local view of DINO, of a patch
WIDTH, DEPTH, HEADS = 64, 4, 2
BATCH, CLASSES = 64, 10
LABELS = 1000  # images that fine-tuning learns from, the first
PARTS = ALL, MIDDLE, LEAST = 58_000, 5_800, 580  # images of a pre-training, the first; those beyond choose
SHOWN, PILOT = 128_000, 4  # images shown in pre-training, and the part of it that a pilot is
PRETRAIN_RATES, RATES = (1e-3, 4e-3, 1.6e-2), (2e-3, 8e-3, 3.2e-2)  # per 256 images
PILOT_RATE = 8e-3  # of the fine-tuning that a pilot is judged by
STEPS, LONGER = 400, 1600  # of fine-tuning
VOCABULARY = 256  # of SplitMask and BEiT
MASKED = round(75 / 196 * (SIDE // PATCH) ** 2)  # patches, BEiT's share
GAIN = 0.05  # of top-1: what a method must be above `scratch`
MARGIN = 0.015  # of top-1: the smallest difference that matters


def prepare(file: Path, fashion: Path) -> None:
    """Writes the images, gray on black, uint8 [n, 28, 28], in the order of the files."""
    arrays = {}
    for split, name in FILES.items():
        arrays[f"x_{split}"], arrays[f"y_{split}"] = clothes(epath.Path(fashion), name)
    shared.save(file, arrays)


def common(config: ConfigDict, cell: Cell, work: Path, steps: int) -> ConfigDict:
    """Sets data, encoder and duration."""
    config.seed, config.batch_size = cell["seed"], BATCH
    config.data.update(source="npz", path=str(work / "clothes.npz"), image_size=(SIDE, SIDE), crop_scale=(0.4, 1.0),
                       threads=1, workers="0")
    config.model.update(width=WIDTH, depth=DEPTH, heads=HEADS, patch=(PATCH, PATCH),
                        pool="cls" if cell["method"] == "dino" else "mean")
    config.eval.update(crop_ratio=(1.0,), every=f"{steps} steps")
    config.checkpoint.every = config.train.duration = f"{steps} steps"
    config.log.update(every="50 steps", tensorboard=False)
    config.optim.warmup = f"{max(1, steps // 20)} steps"
    return config


def pretraining(cell: Cell, work: Path) -> ConfigDict:
    """Returns the config of one pre-training, or of a pilot."""
    method = cell["method"]
    config = common(default(method), cell, work, SHOWN // (PILOT if cell["kind"] == "pilot" else 1) // BATCH)
    config.data.train_split = f"train[:{cell['images']}]"
    config.eval.test = False
    config.optim.update(lr=cell["lr"], clip=3.0)
    if method == "dino":
        config.method.update(out_dim=1024, head_width=256, bottleneck=64, local_views=2, local_size=(LOCAL,) * 2,
                             local_scale=(0.1, 0.4), blur=(0.1, 2 * SIDE / 224), momentum=0.98, freeze_last="50 steps")
        config.optim.update(weight_decay=0.04, final_weight_decay=0.4)
        return config.lock()
    if method != "beit":
        config.method.update(decoder_width=WIDTH, decoder_depth=2, decoder_heads=HEADS)
    if method != "mae":
        config.method.vocabulary = VOCABULARY
    if method == "beit":
        config.method.masked = MASKED
    return config.lock()


def finetuning(cell: Cell, work: Path, encoder: str) -> ConfigDict:
    """Returns the config of one fine-tuning; encoder '': from random weights. A pilot does not read the test split."""
    config = common(default("supervised"), cell, work, cell["steps"])
    config.data.update(train_split=f"train[:{LABELS}]", val_split=f"train[{ALL}:]")
    config.eval.test = cell["kind"] != "pilot"
    config.init_from = encoder
    config.model.update(positions="learned", drop_path=0.1 if encoder else 0.0)
    config.method.update(head="probe", smoothing=0.1)
    config.optim.update(lr=cell["lr"], min_lr=1e-6, betas=(0.9, 0.999), layer_decay=1.0)
    return config.lock()


def plan(cells: list[Cell]) -> Iterator[list[Cell]]:
    """Yields the stages: rates, three seeds of all images, and if these can tell something of the least, then all."""
    yield [{"kind": "pilot", "method": method, "images": ALL, "seed": 0, "lr": lr}
           for method, lr in itertools.product(METHODS, PRETRAIN_RATES)]
    yield [tuned(SCRATCH, 0, 0.0, lr, steps) for lr, steps in itertools.product(RATES, (STEPS, LONGER))]
    pilots, others = SEEDS[:PILOT_SEEDS], SEEDS[PILOT_SEEDS:]
    yield from arms(cells, ALL, pilots)
    for images, seeds, checked in ((LEAST, pilots, pilots), (ALL, others, pilots), (LEAST, others, SEEDS),
                                   (MIDDLE, pilots, SEEDS)):
        if not passed(shared.of_seeds(cells, checked), "dino"):
            return
        yield from arms(cells, images, seeds)


def arms(cells: list[Cell], images: int, seeds: tuple[int, ...]) -> Iterator[list[Cell]]:
    """Yields the stages of a part of the images: encoders, the rates of the first seed, then those of the others."""
    rates = {method: shared.chosen(cells, kind="pilot", method=method) for method in METHODS}
    yield [{"kind": "pretrained", "method": method, "images": images, "seed": seed, "lr": rates[method]}
           for seed in seeds for method in METHODS]
    if 0 in seeds:
        yield [tuned(method, images, rates[method], lr, steps)
               for method, lr, steps in itertools.product(METHODS, RATES, (STEPS, LONGER))]
    names = [*METHODS, SCRATCH] if images == ALL else METHODS
    yield [best(cells, method, images if method in METHODS else 0) | {"seed": seed}
           for seed in seeds for method in names]


def tuned(method: str, images: int, encoder_lr: float, lr: float, steps: int = STEPS) -> Cell:
    """Returns the cell of a fine-tuning of seed 0."""
    return {"kind": "tuned", "method": method, "images": images, "encoder_lr": encoder_lr, "lr": lr, "steps": steps,
            "seed": 0}


def best(cells: list[Cell], method: str, images: int) -> Cell:
    """Returns the fine-tuning that seed 0 chose on the images held out; the lower rate and the fewer steps of two."""
    tried = [cell for cell in cells
             if matches(cell, {"kind": "tuned", "method": method, "images": images, "seed": 0})]
    found = max(tried, key=lambda cell: (cell["val"], -cell["lr"], -cell["steps"]))
    return tuned(method, images, found["encoder_lr"], found["lr"], found["steps"])


def run(cell: Cell, work: Path) -> Cell:
    """Trains a cell and returns it with what was measured; a pilot at a rate that diverges has an accuracy of 0."""
    begun = time.process_time()
    try:
        found = measured(cell, work)
    except GuardError:
        if cell["kind"] != "pilot":
            raise
        found = {"val": 0.0}
    return {**cell, **found, "cpu_seconds": round(time.process_time() - begun, 1)}


def measured(cell: Cell, work: Path) -> Cell:
    """Trains a cell and returns what was measured; pre-trained encoders stay under `work`."""
    kind = cell["kind"]
    folder = work / "_".join(str(cell[key]) for key in ("method", "images", "seed"))
    if kind == "pilot":
        folder = work / f"pilot_{cell['method']}_{cell['lr']:g}"
    if cell["images"]:  # if it is not there
        lr = cell["encoder_lr"] if kind == "tuned" else cell["lr"]
        shared.trained(pretraining(cell | {"lr": lr}, work), folder, work)
    if kind == "pretrained":
        return {"knn": nearest(folder, work / "clothes.npz")}
    tuning = cell if kind == "tuned" else cell | {"lr": PILOT_RATE, "steps": STEPS}
    last = shared.trained(finetuning(tuning, work, str(folder) if cell["images"] else ""), None, work)
    return {"val": last["val/top1"]} | ({"test": last["eval/top1"]} if kind == "tuned" else {})


def nearest(folder: Path, file: Path) -> float:
    """Returns the test top-1 of k-NN on frozen features, by the labeled images."""
    loaded = open_encoder(str(folder), batch_size=250)
    with np.load(file) as arrays:
        pairs = [(arrays[f"x_{split}"][:stop], arrays[f"y_{split}"][:stop].astype(np.int32))
                 for split, stop in (("train", LABELS), ("test", None))]
    train, test = ((loaded(np.repeat(pixels[..., None], 3, -1)), labels) for pixels, labels in pairs)
    return round(float(knn.top1(train, test, CLASSES, 20, 0.07)), 4)


def tests(cells: list[Cell], method: str, images: int) -> dict[int, float]:
    """Returns seed → test accuracy of an arm, fine-tuned as it chose."""
    if not any(matches(cell, {"kind": "tuned", "method": method, "images": images, "seed": 0}) for cell in cells):
        return {}
    mine = {key: value for key, value in best(cells, method, images).items() if key != "seed"}
    return shared.by_seed((cell for cell in cells if matches(cell, mine)), "test")


def gain(cells: list[Cell], method: str) -> float:
    """Returns how far a method is above no pre-training, on all images."""
    return shared.mean_gain(tests(cells, method, ALL), tests(cells, SCRATCH, 0))


def above_knn(cells: list[Cell], method: str) -> float:
    """Returns how far fine-tuning is above k-NN on the same encoder, on all images."""
    return shared.mean_gain(tests(cells, method, ALL), neighbors(cells, method))


def neighbors(cells: list[Cell], method: str) -> dict[int, float]:
    """Returns seed → test accuracy of k-NN on frozen features, on all images."""
    what = {"kind": "pretrained", "method": method, "images": ALL}
    return shared.by_seed((cell for cell in cells if matches(cell, what)), "knn")


def passed(cells: list[Cell], method: str) -> bool:
    """Says whether a method has something to lose, by a fine-tuning that works."""
    return gain(cells, method) >= GAIN and above_knn(cells, method) > 0


def lost(cells: list[Cell], method: str) -> dict[int, float]:
    """Returns seed → what a method loses from all images to the least."""
    most, least = (tests(cells, method, images) for images in (ALL, LEAST))
    return {seed: most[seed] - least[seed] for seed in most.keys() & least.keys()}


def comparisons(cells: list[Cell]) -> list[Comparison]:
    """Returns what is asked."""
    return [Comparison(f"{method} loses less than dino", lost(cells, "dino"), lost(cells, method), MARGIN,
                       passed(cells, "dino") and passed(cells, method)) for method in METHODS if method != "dino"]


def table(cells: list[Cell]) -> str:
    """Returns the Markdown: accuracies, the manipulation check, and verdicts."""
    def figures(values: dict[int, float]) -> str:
        return text([*values.values()])

    lines = [f"Top-1 on the 10,000 test images after fine-tuning with {LABELS:,} labels; mean (range) of seeds. The "
             f"last three columns are of {ALL:,} images; the check asks for {GAIN:g} above no pre-training, and for "
             "more than k-NN.", "",
             f"| pre-trained with | {' | '.join(f'{images:,} images' for images in PARTS)} | lost from most to least | "
             "above no pre-training | k-NN | check |", "|---" * (5 + len(PARTS)) + "|"]
    for method in METHODS:
        arms_of = [figures(tests(cells, method, images)) for images in PARTS]
        known = tests(cells, method, ALL)
        check = ("yes" if passed(cells, method) else "no") if known else "-"
        above = f"{gain(cells, method):+.3f}" if known else "-"
        lines.append(f"| {method} | {' | '.join(arms_of)} | {figures(lost(cells, method))} | {above} | "
                     f"{figures(neighbors(cells, method))} | {check} |")
    lines += ["", f"Without pre-training: {figures(tests(cells, SCRATCH, 0))}.", ""]
    findings = judge(comparisons(cells))
    lines += [verdict_table(findings), "", *outlook(findings, PILOT_SEEDS, len(SEEDS))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/small_data"), help="images and pre-trained encoders")
    parser.add_argument("--fashion", type=Path, default=Path("runs/fashion_mnist"), help="Fashion-MNIST's files")
    parser.add_argument("--hours", type=float, default=0.0, help="begin no cell after so many hours; 0: no limit")
    parser.add_argument("--workers", type=shared.positive, default=1, help="cells at once; --work must be kept")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "clothes.npz").exists():
        prepare(options.work / "clothes.npz", options.fashion)
    cells = shared.read(RESULTS)
    stages = shared.limited(plan(cells), cells, hours=options.hours, at_once=options.workers)
    shared.go_on(RESULTS, cells, stages, partial(run, work=options.work),
                 lambda: RESULTS.with_suffix(".md").write_text(table(cells)), options.workers)
    print(table(cells))


if __name__ == "__main__":
    main()
