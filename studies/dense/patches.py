"""What do frozen patches tell of the digits on them, and how much of them is one vector that all share?

  python studies/dense/patches.py      (20 minutes of one core; resumes after an interruption)

The MAE of detection (study.py) is the one of four that tells most of the digits: each target with two learning rates;
beside them an encoder of random weights; one seed. On the encoder's normalized patches of 300 training images, linear
discriminants are fitted that tell the digit whose box covers the middle of a patch, or that none does; they are read
on 300 other training images. The share of one vector is the squared norm of the mean patch over the mean squared
norm, of the last block's output, which detectors read.

One JSON line per encoder is in studies/dense/patches.jsonl, the table in patches.md.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import balanced_accuracy_score

from mae_jax.data.objects import Objects
from mae_jax.data.sources import registry
from mae_jax.inference.encoder import Encoder, open_encoder

sys.path.insert(0, str(Path(__file__).parent))  # of study.py
sys.path.insert(0, str(Path(__file__).parents[1]))  # of what the studies share
import cells as shared
import study
from cells import Cell, text

RESULTS = Path(__file__).parent / "patches.jsonl"
TASK = "detection"
UNTRAINED = "none: untrained"
IMAGES = 300  # to fit discriminants to, and as many to read them on
FEW, MANY = 700, 3000  # patches of a digit, and of the background, that discriminants are fitted to, at most
SHRINKAGE = 1e-3  # of the discriminants' covariance
ARMS = (UNTRAINED, 0.0), ("pixel", 2e-2), ("pixel", 6e-3), ("norm_pix", 2e-2), ("norm_pix", 6e-3)  # target, rate


def trained(cell: Cell, work: Path) -> Path:
    """Pre-trains, if it is not there, and returns the workdir."""
    folder, untrained = work / f"{cell['target'].split(':')[0]}_{cell['lr']:g}", cell["target"] == UNTRAINED
    config = study.pretraining({"task": TASK, "seed": 0}, 1 if untrained else study.TASKS[TASK].pretraining)
    with config.unlocked():
        config.optim.lr = cell["lr"]
        config.method.target = "pixel" if untrained else cell["target"]
    shared.trained(config, folder, work)
    return folder


def digits(objects: Objects | None, grid: tuple[int, int], patch: tuple[int, int]) -> np.ndarray:
    """Returns the class of each patch, int [rows, columns]: 1 + that of the last box over its middle, or 0."""
    assert objects is not None
    rows, columns = (side * (np.arange(count) + 0.5) for side, count in zip(patch, grid, strict=True))
    found = np.zeros(grid, int)
    for (left, top, right, bottom), label in zip(objects.box, objects.label, strict=True):
        found[np.ix_((top <= rows) & (rows < bottom), (left <= columns) & (columns < right))] = label + 1
    return found


def measured(cell: Cell, work: Path) -> Cell:
    """Returns a cell with the balanced accuracies of discriminants, and the share of one vector."""
    encoder = open_encoder(str(trained(cell, work)))
    with encoder.config.unlocked():
        encoder.config.eval.crop_ratio = (1.0,)
    (features, labels), (held, truth) = (part(encoder, first) for first in (0, IMAGES))
    draws = np.random.default_rng(0)
    taken = np.concatenate([draws.permutation(np.flatnonzero(labels == each))[:FEW if each else MANY]
                            for each in np.unique(labels)])
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE).fit(features[taken], labels[taken])
    said = model.predict(held)
    last, _ = part(encoder, IMAGES, encoder.config.model.depth - 1)
    common = np.square(last.mean(0)).sum() / np.square(last).sum(1).mean()
    found = {"digits": balanced_accuracy_score(truth, said),
             "foreground": balanced_accuracy_score(truth > 0, said > 0), "common": float(common)}
    return {**cell, **{name: round(value, 4) for name, value in found.items()}}


def part(encoder: Encoder, first: int, block: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features [n, D] of a block's patches of IMAGES training images, and the classes of these [n]."""
    source = registry.load(ConfigDict({"source": "digit_scenes"}), f"train[{first}:{first + IMAGES}]")
    shown = [source.read(number) for number in range(source.size)]
    features = encoder([example.image for example in shown], "patches", block)
    labels = [digits(example.objects, encoder.grid.shape, tuple(encoder.config.model.patch)) for example in shown]
    return features.reshape(-1, encoder.width), np.concatenate(labels, axis=None)


def table(cells: list[Cell]) -> str:
    """Returns the Markdown."""
    def row(target: str, lr: float) -> str:
        found = [cell for cell in cells if shared.matches(cell, {"target": target, "lr": lr})]
        return " | ".join(text([cell[name] for cell in found]) for name in ("digits", "foreground", "common"))

    return "\n".join([
        "Of patches of digit scenes, by linear discriminants on frozen features: balanced accuracy of one seed (by "
        "chance 0.091 and 0.5); and the share of the squared norm of the last block's patches that is one vector.", "",
        "| target of the MAE | learning rate | digit or none, 11 classes | digit or not | one vector |",
        "|---" * 5 + "|",
        *(f"| {target} | {lr:g} | {row(target, lr)} |" for target, lr in ARMS)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/dense_patches"), help="where encoders stay")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    cells = shared.read(RESULTS)
    plan = [{"target": target, "lr": lr} for target, lr in ARMS]
    shared.go_on(RESULTS, cells, [plan], functools.partial(measured, work=options.work),
                 lambda: RESULTS.with_suffix(".md").write_text(table(cells)))
    print(table(cells))


if __name__ == "__main__":
    main()
