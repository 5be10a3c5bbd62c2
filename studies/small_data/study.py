"""Do masked-image methods lose less than DINO with less pre-training data? The question of arXiv 2112.10740.

  scripts/fetch_clipart.sh runs/openclipart                       (or apt-get install openclipart-png)
  python studies/small_data/study.py --prepare --clipart=runs/openclipart
  python studies/small_data/study.py                                    (resumes after an interruption)
  python studies/small_data/study.py --size=gpu                         (one GPU: the whole grid)

Every method is pre-trained on nested subsets of a small data set, with a vocabulary built from that subset alone, for
the same number of images seen. Then the encoder is fine-tuned on the labels of the whole training split, except for a
held-out tenth for validation. Each method pre-trains at one of three learning rates: the one whose pilot, a quarter as
long on all data, has the best linear probe on the validation part. `scratch` is fine-tuned from random weights with its
own recipe (every layer at the full rate, no stochastic depth), `scratch, longer` for as many images as pre-training and
fine-tuning together. The validation part chooses each arm's learning rate from the same three values, with seed 0; the
other seeds then train at that rate. A cell reads the test split once, with its last weights; only cells at the chosen
rate enter the tables. A method is compared with DINO only if both are seen above the better scratch on all data
(studies/verdicts.py; a point and a half matters, our choice).

DINO is pooled by its class token, which it trains, the others by the mean. Its teacher's momentum is 0.98, for a run of
some 900 steps, and its last layer is frozen for 20 steps for every subset. BEiT's masks are random: 38 % of 36 patches
are fewer than its smallest block. Clip art has 123 validation and 330 test images: one image is 0.8 and 0.3 points; 4
of the 330 are byte for byte in the training split. The committed cells have three seeds, too few for a conclusion;
another run adds seeds up to the eight of a verdict.

The speeds of the committed table were measured partly beside other work: benchmarks/methods.py compares train steps
fairly. One JSON line per cell is in studies/small_data/results_<size>.jsonl; the table in .md, the plot in .png.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.config import default
from mae_jax.training import loop

sys.path.insert(0, str(Path(__file__).parents[1]))  # of cells.py, which the studies share
import cells as shared
from cells import Cell, matches, text
from verdicts import SEEN, Comparison, judge
from verdicts import table as verdict_table

RESULTS = Path(__file__).parent
BATCH, SEEDS, LRS = 64, tuple(range(8)), (2e-3, 8e-3, 3.2e-2)
PRETRAIN_LRS = (5e-4, 2e-3, 6e-3)  # per 256 images
VOCABULARY = 120  # the smallest part of the data has 637 patches that are not constant, and a fifth of these is 127
PILOT = 4  # pilots show a quarter of the images
WIDTH, DEPTH, HEADS, DECODER = 96, 4, 3, 2
TUNED = 30  # epochs of fine-tuning
HELD = 0.1  # of the training split, chooses
MARGIN = 0.015  # of accuracy: the smallest difference that matters


class Set(NamedTuple):
    """How a data set is stored and seen: all in pixels."""

    stored: int
    side: int
    patch: int
    flip: bool


class Size(NamedTuple):
    """The part of the grid that is run."""

    sets: tuple[str, ...]
    percents: tuple[float, ...]
    images: int  # shown in pre-training


SETS = {"clipart": Set(60, 48, 8, True), "mnist5k": Set(32, 32, 4, False)}
SIZES = {"cpu": Size(("clipart",), (100, 5), 60_000), "gpu": Size(("clipart", "mnist5k"), (100, 10, 2.5), 200_000)}
METHODS = ("splitmask", "beit", "mae", "dino")
SCRATCH = ("scratch", "scratch, longer")


def prepare(folder: Path, clipart: str) -> None:
    """Writes <set>.npz: images on a white square (digits: black, padded), training rows in random order."""
    from mae_jax.data.sources import registry

    folder.mkdir(parents=True, exist_ok=True)
    for name, about in SETS.items():
        arrays, data = {}, default().data.copy_and_resolve_references()
        data.update(source=name, path=clipart if name == "clipart" else "")
        for split in ("train", "test"):
            found = registry.load(data, split)
            examples = [found.read(int(i)) for i in np.random.default_rng(0).permutation(found.size)]
            arrays[f"x_{split}"] = np.stack([square(example.image, about) for example in examples])
            arrays[f"y_{split}"] = np.array([example.label for example in examples])
        np.savez_compressed(folder / f"{name}.npz", **arrays)
        print(folder / f"{name}.npz", {key: value.shape for key, value in arrays.items()})


def square(pixels: np.ndarray, about: Set) -> np.ndarray:
    """Returns the whole image in the middle of a square of the stored size."""
    image = Image.fromarray(pixels)
    if max(image.size) > about.stored:
        image.thumbnail((about.stored, about.stored), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (about.stored, about.stored), tuple(int(v) for v in pixels[0, 0]))
    canvas.paste(image, ((about.stored - image.width) // 2, (about.stored - image.height) // 2))
    return np.asarray(canvas)


def common(config: ConfigDict, cell: Cell, folder: Path, percent: float, steps: int) -> ConfigDict:
    """Sets data, model and duration: the first `percent` of what is not held out of the training split."""
    name, method, seed = cell["set"], cell["method"], cell["seed"]
    about, file = SETS[name], folder / f"{name}.npz"
    with np.load(file) as arrays:
        count = len(arrays["y_train"])
    learned = round(count * (1 - HELD))
    config.seed, config.batch_size = seed, BATCH
    config.data.update(source="npz", path=str(file), train_split=f"train[:{round(learned * percent / 100)}]",
                       val_split=f"train[{learned}:]", image_size=(about.side, about.side), flip=about.flip,
                       crop_scale=(0.4, 1.0))
    config.model.update(width=WIDTH, depth=DEPTH, heads=HEADS, patch=(about.patch, about.patch),
                        pool="cls" if method == "dino" else "mean")
    config.eval.update(crop_ratio=(1.0,), every=f"{steps} steps")
    config.checkpoint.every = f"{steps} steps"
    config.log.update(every="25 steps", tensorboard=False)
    config.train.duration = f"{steps} steps"
    config.optim.warmup = f"{steps // 20} steps"
    return config


def pretraining(cell: Cell, folder: Path, images: int) -> ConfigDict:
    """Returns the config of one pre-training."""
    method, side = cell["method"], SETS[cell["set"]].side
    config = common(default(method), cell, folder, cell["percent"], images // BATCH)
    config.eval.test = False
    config.optim.update(lr=cell["lr"], clip=3.0)
    if method == "dino":
        config.method.update(out_dim=1024, head_width=256, bottleneck=64, local_views=2, local_size=(side // 2,) * 2,
                             local_scale=(0.1, 0.4), blur=(0.1, 2 * side / 224), momentum=0.98, freeze_last="20 steps")
        config.optim.update(weight_decay=0.04, final_weight_decay=0.4)
    else:
        if method != "beit":
            config.method.update(decoder_width=WIDTH, decoder_depth=DECODER, decoder_heads=HEADS)
        if method != "mae":
            config.method.vocabulary = VOCABULARY
        if method == "beit":
            config.method.masking = "random"
            config.method.masked = round(75 / 196 * (side // SETS[cell["set"]].patch) ** 2)
    return config.lock()


def finetuning(cell: Cell, folder: Path, encoder: str, images: int) -> ConfigDict:
    """Returns the config of one fine-tuning, on all but the part held out; encoder '': from random weights."""
    config = common(default("supervised"), cell, folder, 100, 1)
    stop = int(config.data.train_split.removeprefix("train[:").removesuffix("]"))
    steps = TUNED * stop // BATCH + (images // BATCH if cell["method"] == "scratch, longer" else 0)
    common(config, cell, folder, 100, steps)
    config.init_from = encoder
    config.model.update(positions="learned", drop_path=0.1 if encoder else 0.0)
    config.method.update(smoothing=0.1)
    config.optim.update(lr=cell["lr"], betas=(0.9, 0.999), layer_decay=0.75 if encoder else 1.0)
    return config.lock()


def plan(size: Size, cells: list[Cell]) -> Iterator[Cell]:
    """Yields what is to be run, in order: seed 0 of everything first; later seeds take the rate that it chose."""
    for name, method, lr in itertools.product(size.sets, METHODS, PRETRAIN_LRS):
        yield {"kind": "pilot", "set": name, "method": method, "percent": 100, "seed": 0, "lr": lr}
    for seed in SEEDS:
        for name in size.sets:
            arms = [{"set": name, "method": method, "percent": percent}
                    for percent in size.percents for method in METHODS]
            for arm in (*arms, *({"set": name, "method": method, "percent": 0} for method in SCRATCH)):
                if arm["percent"]:
                    lr = shared.chosen(cells, kind="pilot", set=name, method=arm["method"])
                    yield {"kind": "pretrained", **arm, "seed": seed, "lr": lr}
                for lr in LRS if seed == 0 else (shared.chosen(cells, kind="tuned", **arm),):
                    yield {"kind": "tuned", **arm, "seed": seed, "lr": lr}


def run(cell: Cell, cells: list[Cell], size: Size, work: Path, programs: str) -> Cell:
    """Trains a cell and returns it with what was measured; pre-trained encoders stay under `work`."""
    name = f"{size.images}_{cell['set']}_{cell['method']}_{cell['percent']}_{cell['seed']}"
    images = size.images // PILOT if cell["kind"] == "pilot" else size.images
    if cell["kind"] == "pretrained":
        config, folder = pretraining(cell, work, images), work / name
    elif cell["kind"] == "pilot":
        config, folder = pretraining(cell, work, images), Path(tempfile.mkdtemp(dir=programs)) / "pilot"
    else:
        encoder = str(work / name) if cell["percent"] else ""
        if encoder and not (work / name / "DONE").exists():  # that of an earlier call may be gone
            lr = shared.chosen(cells, kind="pilot", set=cell["set"], method=cell["method"])
            run({**cell, "kind": "pretrained", "lr": lr}, cells, size, work, programs)
        config, folder = finetuning(cell, work, encoder, size.images), Path(tempfile.mkdtemp(dir=programs)) / "tuned"
    config.train.compilation_cache = programs
    if loop.train(config, str(folder), alone=False):
        raise SystemExit(f"{cell} did not finish")
    last = shared.last_values(folder)
    if cell["kind"] == "tuned":
        return {**cell, "val": last["val/top1"], "test": last["eval/top1"]}
    speed = shared.speed(folder)
    return {**cell, "images_per_sec": round(speed, 1), "seconds": round(images / speed, 1),
            "val": last["val/linear/top1"], "val_knn": last["val/knn/top1"], "val_loss": last["val/loss"]}


def accuracies(cells: list[Cell], **arm: Any) -> dict[int, float]:
    """Returns seed → test accuracy of an arm at the rate that it chose."""
    found = [cell for cell in cells if matches(cell, {"kind": "tuned"} | arm)]
    if not any(cell["seed"] for cell in found):
        return {}
    rate = shared.chosen(cells, kind="tuned", **arm)
    return shared.by_seed((cell for cell in found if cell["lr"] == rate), "test")


def table(size: Size, cells: list[Cell]) -> str:
    """Returns the Markdown: a table for each data set, and what follows from it."""
    lines = ["Top-1 on the test split after fine-tuning on the labels of nine tenths of the training split; mean "
             f"(range) of seeds. Pre-training shows {size.images:,} images.", ""]
    for name in size.sets:
        heads = [f"{percent:g} %" for percent in size.percents]
        lines += [f"**{name}**", "", f"| pre-trained with | {' | '.join(heads)} | drop to {heads[-1]} | images/s | "
                  "pre-training s |", "|---" * (4 + len(heads)) + "|"]
        for method in METHODS:
            arms = [accuracies(cells, set=name, method=method, percent=percent) for percent in size.percents]
            speeds = [cell for cell in cells if matches(cell, {"kind": "pretrained", "set": name, "method": method})]
            lines.append(f"| {method} | {' | '.join(text([*arm.values()]) for arm in arms)} | "
                         f"{text([*drops(arms).values()])} | "
                         f"{_median(speeds, 'images_per_sec')} | {_median(speeds, 'seconds')} |")
        for method in SCRATCH:
            scores = accuracies(cells, set=name, method=method, percent=0)
            lines.append(f"| nothing ({method}) | {text([*scores.values()])} {'| ' * (3 + len(heads))}|")
        lines += ["", *verdicts(size, cells, name), ""]
    return "\n".join(lines)


def drops(arms: list[dict[int, float]]) -> dict[int, float]:
    """Returns seed → what it loses from the first part to the last."""
    return {seed: arms[0][seed] - arms[-1][seed] for seed in arms[0].keys() & arms[-1].keys()}


def _median(cells: list[Cell], key: str) -> str:
    return f"{statistics.median(cell[key] for cell in cells):.0f}" if cells else "-"


def verdicts(size: Size, cells: list[Cell], name: str) -> list[str]:
    """Says which methods are above scratch at 100 %, and where these and DINO are, which lose less than DINO."""
    scratch = [cell for cell in cells if matches(cell, {"kind": "tuned", "set": name, "percent": 0, "seed": 0})]
    chosen_arm = max(scratch, key=lambda cell: cell["val"], default={"method": ""})["method"]  # by the part held out
    best = accuracies(cells, set=name, method=chosen_arm, percent=0)
    found = {method: [accuracies(cells, set=name, method=method, percent=percent) for percent in size.percents]
             for method in METHODS}
    check = judge([Comparison(f"{method} above {chosen_arm or 'scratch'}", found[method][0], best, MARGIN)
                   for method in METHODS])
    useful = {method for method, finding in zip(METHODS, check, strict=True) if finding.verdict == SEEN}
    claims = judge([Comparison(f"{method} loses less than dino", drops(found["dino"]), drops(found[method]), MARGIN,
                               check={method, "dino"} <= useful) for method in METHODS[:-1]])
    return ["Manipulation check, on all of the data:", "", verdict_table(check), "", "The claim:", "",
            verdict_table(claims)]


def plot(size: Size, cells: list[Cell]) -> bytes:
    """Returns a PNG: accuracy over the part of the data that was pre-trained on, one panel for each data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(size.sets), 4.5), layout="constrained", dpi=120)
    for axes, name in zip(figure.subplots(1, len(size.sets), squeeze=False)[0], size.sets, strict=True):
        for place, method in enumerate(METHODS):
            arms = [(percent, [*accuracies(cells, set=name, method=method, percent=percent).values()])
                    for percent in size.percents]
            points = [(percent * 1.04 ** (place - 1.5), scores) for percent, scores in arms if scores]
            if points:
                x, means = zip(*[(x, statistics.mean(scores)) for x, scores in points], strict=True)
                spread = [[abs(mean - end(scores)) for mean, (_, scores) in zip(means, points, strict=True)]
                          for end in (min, max)]
                axes.errorbar(x, means, spread, marker="o", capsize=3, label=method)
        for method, style in zip(SCRATCH, (":", "--"), strict=True):
            if scores := accuracies(cells, set=name, method=method, percent=0):
                axes.axhline(statistics.mean(scores.values()), color="grey", linestyle=style, label=method)
        axes.set_xscale("log")
        axes.set_xticks(size.percents, [f"{percent:g} %" for percent in size.percents])
        axes.minorticks_off()
        axes.set_title(name)
        axes.set_xlabel("part of the training images that pre-training saw")
        axes.set_ylabel("top-1, mean and range of seeds")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return shared.png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/small_data"), help="images and pre-trained encoders")
    parser.add_argument("--prepare", action="store_true", help="write the images there, and end")
    parser.add_argument("--clipart", default="", help="folder of openclipart's PNG files, where it is not installed")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.work, options.clipart)
        return
    size, results = SIZES[options.size], RESULTS / f"results_{options.size}.jsonl"
    cells = shared.read(results)

    def report() -> None:
        results.with_suffix(".md").write_text(table(size, cells))
        results.with_suffix(".png").write_bytes(plot(size, cells))

    with tempfile.TemporaryDirectory() as programs:
        shared.go_on(results, cells, ([cell] for cell in plan(size, cells)),
                     lambda cell: run(cell, cells, size, options.work, programs), report)
    print(table(size, cells))


if __name__ == "__main__":
    main()
