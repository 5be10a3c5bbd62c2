"""Does one masked autoencoder of two domains transfer worse than one of each domain, and does MoCE help?

  python studies/negative_transfer/study.py --workers=2            (hours on two cores; resumes after an interruption)
  python studies/negative_transfer/study.py --size=gpu --workers=8 (cells at the same time on one GPU; not yet run)

The two domains have little in common: A, crops of photographs, and B, handwritten digits (arXiv 2402.05382, Figure 1,
asks this question for two halves of ImageNet). MAE is trained on A, on B and on both, with equal steps. Starting from
the MAE of both, `both, longer` trains for as many further steps as the mixtures: MoCE (4 experts, 16 clusters) and the
sparse mixture with routing by token. From MoCE, each task takes the path with the most votes (`MoCE, vote`) or another
one (`MoCE, random`). One more encoder is `untrained`.

Encoders are evaluated on each domain's task: logistic regression on frozen features (no rate to choose), and
fine-tuning, whose rate is chosen from three with seed 0 on the last tenth of the task's training split; the test split
is read once per figure. In so few steps the classifier needs a batch norm: with a layer norm alone, the encoder of both
reached an accuracy of at most 0.35 on the digits (seed 0, trials of 200 to 400 steps). The mixture with routing by
token is no dense encoder, and is evaluated by its features alone, as is the untrained one. Verdicts are those of
studies/verdicts.py, for eight seeds; that a point matters is our choice. The committed cells have three seeds, too few
for a conclusion; another run adds the others.

One JSON line per cell is in studies/negative_transfer/results_<size>.jsonl, the table in .md, the plot in .png.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.commands.cluster.images import cluster
from mae_jax.commands.export.expert_path import pooled
from mae_jax.commands.export.weights import export
from mae_jax.config import default, resolved
from mae_jax.data import NO_DATA
from mae_jax.evals import linear_probe
from mae_jax.evals.context import Pair
from mae_jax.methods import build
from mae_jax.param_tree import split_eval_params
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import loop, workdir

sys.path.insert(0, str(Path(__file__).parents[1]))  # of cells.py, which the studies share
import cells as shared
from cells import Cell, matches, text
from verdicts import Comparison, judge
from verdicts import table as verdict_table

RESULTS = Path(__file__).parent
SIDE, PATCH, BATCH, SEEDS = 40, 4, 64, tuple(range(8))
CLASSES = {"A": "0-16", "B": "17-26"}  # of the joined data: photographs, then digits
DENSE = {"A": "A", "B": "B", "both": "both"}  # arm → what it is pre-trained on
UNTRAINED, LONGER, MOCE, TOKEN = "untrained", "both, longer", "MoCE", "tokens"
JUDGED = (UNTRAINED, *DENSE, LONGER, "MoCE, vote", "MoCE, random", TOKEN)
PROBED = (UNTRAINED, TOKEN)  # and not fine-tuned
MARGIN = 0.01  # of accuracy: the smallest difference that matters
LABELS = 510  # labeled images of a task that fine-tuning learns from, its first
TUNED, TUNED_BATCH, LRS = 200, 32, (1.2e-2, 2.4e-2, 4.8e-2)  # steps of fine-tuning, and rates of batches of 256


class Size(NamedTuple):
    """Pictures shown in the first training, and in what follows it."""

    first: int
    more: int
    seeds: tuple[int, ...] = SEEDS


SIZES = {"cpu": Size(64_000, 25_600), "gpu": Size(100_000, 40_000)}


def prepare(file: Path) -> None:
    """Writes both domains as one npz, rows in random order; digits are padded to the side of the crops."""
    from PIL import Image

    from mae_jax.data.sources import registry

    arrays = {}
    for split in ("train", "test"):
        pictures, labels = [], []
        for name, offset in (("photo_crops", 0), ("mnist5k", 17)):
            data = default().data.copy_and_resolve_references()
            data.source = name
            found = registry.load(data, split)
            for example in (found.read(i) for i in range(found.size)):
                image = Image.fromarray(example.image)
                if name == "photo_crops":
                    pictures.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
                else:
                    edge = (SIDE - image.width) // 2
                    pictures.append(np.pad(example.image, ((edge, edge), (edge, edge), (0, 0))))
                labels.append(example.label + offset)
        order = np.random.default_rng(0).permutation(len(labels))
        arrays |= {f"x_{split}": np.stack(pictures)[order], f"y_{split}": np.array(labels)[order]}
    np.savez_compressed(file, **arrays)


def rows(file: Path, task: str) -> tuple[int, int]:
    """Returns the rows before which LABELS images of a task lie, and from which the last tenth does.

    They are of the training split of both domains, which is cut before classes are kept.
    """
    low, high = map(int, CLASSES[task].split("-"))
    labels = np.load(file)["y_train"]
    learned = int(np.flatnonzero((labels >= low) & (labels <= high))[LABELS - 1]) + 1
    return learned, len(labels) * 9 // 10


def common(config: ConfigDict, file: Path, classes: str, seed: int, steps: int) -> ConfigDict:
    """Sets data, encoder and duration."""
    config.seed, config.batch_size = seed, BATCH
    config.data.update(source="npz", path=str(file), classes=CLASSES.get(classes, ""), image_size=(SIDE, SIDE),
                       crop_scale=(0.4, 1.0), flip=False)
    config.model.update(width=96, depth=6, heads=3, patch=(PATCH, PATCH), pool="mean")
    config.eval.update(crop_ratio=(1.0,), every=f"{steps} steps", max_examples=2000)
    config.checkpoint.every = f"{steps} steps"
    config.log.update(every="25 steps", tensorboard=False)
    config.train.duration, config.optim.warmup = f"{steps} steps", f"{max(1, steps // 20)} steps"
    return config


def pretraining(arm: str, file: Path, seed: int, size: Size, work: Path) -> ConfigDict:
    """Returns the config of an arm's training."""
    mixture = arm in (MOCE, TOKEN)
    steps = 1 if arm == UNTRAINED else (size.first if arm in DENSE else size.more) // BATCH
    config = common(default("moce" if mixture else "mae"), file, DENSE.get(arm, "both"), seed, steps)
    config.method.update(decoder_width=96, decoder_depth=2, decoder_heads=3)
    config.optim.lr = 0.0 if arm == UNTRAINED else 6e-3 if arm in DENSE else 3e-3
    if arm not in (*DENSE, UNTRAINED):
        config.init_from = str(work / f"{size.first}_both_{seed}")
    if mixture:
        config.method.update(experts=4, gate="cluster" if arm == MOCE else "token",
                             clusters=str(work / f"{size.first}_clusters_{seed}"))
    return config.lock()


def plan(size: Size, cells: list[Cell]) -> Iterator[list[Cell]]:
    """Yields what is to be run, in order; the cells of a stage may run at the same time."""
    for arms in ((*DENSE, UNTRAINED), (LONGER, MOCE, TOKEN)):
        yield [{"kind": "trained", "arm": arm, "seed": seed} for seed in size.seeds for arm in arms]
    evaluated = list(itertools.product(JUDGED, CLASSES))
    yield [{"kind": "probe", "arm": arm, "task": task, "seed": seed} for seed in size.seeds for arm, task in evaluated]
    tuned = [{"kind": "tuned", "arm": arm, "task": task} for arm, task in evaluated if arm not in PROBED]
    yield [{**known, "seed": 0, "lr": lr} for known in tuned for lr in LRS]
    yield [{**known, "seed": seed, "lr": shared.chosen(cells, **known)} for known in tuned
           for seed in size.seeds[1:]]


class Study:
    """Runs cells; encoders stay under `work`."""

    def __init__(self, size: Size, work: Path, programs: str):
        self.size, self.work, self.programs, self.file = size, work, programs, work / "both.npz"

    def run(self, cell: Cell) -> Cell:
        """Returns the cell with what was measured."""
        if cell["kind"] == "trained":
            last = self.train(cell["arm"], cell["seed"])
            kept = {name: value for name, value in last.items() if name.startswith(("eval/gate", "eval/label_info"))}
            return {**cell, "loss": last.get("eval/reconstruction_loss", last["eval/loss"]), **kept}
        source = self.encoder(cell["arm"], cell["task"], cell["seed"])
        if cell["kind"] == "probe":
            return {**cell, "test": self.probe(source, cell["task"])}
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            config = common(default("supervised"), self.file, cell["task"], cell["seed"], TUNED)
            learned, held = rows(self.file, cell["task"])
            config.data.update(train_split=f"train[:{learned}]", val_split=f"train[{held}:]", crop_scale=(0.8, 1.0))
            config.init_from, config.batch_size = source, TUNED_BATCH
            config.model.positions = "learned"
            config.method.update(head="probe", head_std=0.01, smoothing=0.1)
            config.optim.update(lr=cell["lr"], betas=(0.9, 0.999), layer_decay=0.75)
            last = self._train(config.lock(), Path(folder))
        return {**cell, "val": last["val/top1"], "test": last["eval/top1"]}

    def folder(self, arm: str, seed: int) -> Path:
        return self.work / f"{self.size.first}_{arm.replace(', ', '_')}_{seed}"

    def train(self, arm: str, seed: int) -> dict[str, float]:
        """Trains an arm, if it is not there, after what it starts from. Returns its last figures."""
        if arm not in (*DENSE, UNTRAINED):
            self.train("both", seed)
        clusters = self.work / f"{self.size.first}_clusters_{seed}"
        if arm == MOCE and not (clusters / "clusters.npz").exists():
            cluster(str(self.folder("both", seed)), str(clusters), 16, -1, 3.0, seed, None)
        if not (self.folder(arm, seed) / "DONE").exists():
            self._train(pretraining(arm, self.file, seed, self.size, self.work), self.folder(arm, seed))
        return shared.last_values(self.folder(arm, seed))

    def encoder(self, arm: str, task: str, seed: int) -> str:
        """Returns where the encoder of an arm is; of MoCE, the one that is cut out for the task."""
        if not arm.startswith(MOCE):
            self.train(arm, seed)
            return str(self.folder(arm, seed))
        self.train(MOCE, seed)
        how = arm.removeprefix(f"{MOCE}, ")
        file = self.work / f"{self.size.first}_moce_{how}_{task}_{seed}.safetensors"
        if not file.exists():
            wanted = common(default("mae"), self.file, task, seed, 1)
            export(str(self.folder(MOCE, seed)), str(file), "mae_jax", wanted.lock(), how, seed)
        return str(file)

    def probe(self, source: str, task: str) -> float:
        """Returns the test top-1 of logistic regression on frozen features."""
        config = workdir.config_of(source).copy_and_resolve_references().unlock()
        config.data.update(classes=CLASSES[task], val_split="", eval_split="", augment="none")
        config.eval.max_examples = 1 << 31
        params, extras = split_eval_params(load_params(source, extras=True))
        assert not extras or config.method.get("gate") == "token"

        def pair(split: str) -> Pair:
            config.data.train_split = split
            features, labels = zip(*pooled(build(resolved(config), NO_DATA), params), strict=True)
            return np.concatenate(features), np.concatenate(labels)

        train = pair("train")
        return linear_probe.top1(train, pair("test"), int(train[1].max()) + 1)

    def _train(self, config: ConfigDict, folder: Path) -> dict[str, float]:
        config.train.compilation_cache = self.programs
        if loop.train(config, str(folder), alone=False):
            raise RuntimeError(f"{folder} did not finish")
        return shared.last_values(folder)


def values(cells: list[Cell], kind: str, arm: str, task: str) -> list[float]:
    """Returns the test accuracies of an arm, one per seed; of fine-tunings, at the chosen rate."""
    return [*by_seed(cells, kind, arm, task).values()]


def by_seed(cells: list[Cell], kind: str, arm: str, task: str) -> dict[int, float]:
    """Returns seed → test accuracy, likewise."""
    what = {"kind": kind, "arm": arm, "task": task}
    found = [cell for cell in cells if matches(cell, what)]
    if kind == "tuned" and any(cell["seed"] == 0 for cell in found):
        rate = shared.chosen(cells, **what)
        found = [cell for cell in found if cell["lr"] == rate]
    return shared.by_seed(found, "test")


def table(size: Size, cells: list[Cell]) -> str:
    """Returns the Markdown: accuracies, and what follows."""
    lines = [f"First training {size.first:,} images, what follows {size.more:,}; top-1 on test images, mean "
             f"(range) of seeds. A: photographs, B: digits; fine-tuned with {LABELS} labels.", "",
             "| encoder | A, probe | B, probe | A, fine-tuned | B, fine-tuned |", "|---" * 5 + "|"]
    for arm in JUDGED:
        shown = [text(values(cells, kind, arm, task)) for kind in ("probe", "tuned") for task in CLASSES]
        lines.append(f"| {arm} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", verdict_table(judge(comparisons(cells))), ""])


def comparisons(cells: list[Cell]) -> list[Comparison]:
    """Returns what is asked: whether training on both domains costs a task, and whether MoCE mends it."""
    found = []
    for (kind, way), task in itertools.product((("probe", "probe"), ("tuned", "fine-tuned")), CLASSES):
        for higher, lower, claim in (
                (task, "both", f"{task} alone above both"), ("MoCE, vote", LONGER, "MoCE above both, longer"),
                ("MoCE, vote", "MoCE, random", "the voted path above a random one"),
                ("MoCE, vote", task, f"MoCE above {task} alone")):
            arms = (by_seed(cells, kind, arm, task) for arm in (higher, lower))
            found.append(Comparison(f"task {task}, {way}: {claim}", *arms, MARGIN))
    return found


def plot(cells: list[Cell]) -> bytes:
    """Returns a PNG: each encoder's accuracy on both tasks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained", dpi=120)
    ways = (("probe", "linear probe"), ("tuned", "fine-tuned"))
    for axes, (kind, way) in zip(figure.subplots(1, 2), ways, strict=True):
        for shift, task, color in ((-0.12, "A", "C0"), (0.12, "B", "C1")):
            for place, arm in enumerate(JUDGED):
                if scores := values(cells, kind, arm, task):
                    mean = float(np.mean(scores))
                    spread = [[mean - min(scores)], [max(scores) - mean]]
                    axes.errorbar(place + shift, mean, spread, marker="o", capsize=3, color=color,
                                  label=f"task {task}" if place == 0 else None)
        axes.set_xticks(range(len(JUDGED)), JUDGED, rotation=30, ha="right")
        axes.set_ylabel(f"top-1, {way}; mean and range of seeds")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return shared.png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/negative_transfer"), help="images and encoders")
    parser.add_argument("--workers", type=shared.positive, default=1, help="cells at once; --work must be kept")
    parser.add_argument("--steps", type=shared.positive, help="so few of training: a trial, with results in --work")
    options = parser.parse_args()
    size, results = SIZES[options.size], RESULTS / f"results_{options.size}.jsonl"
    options.work.mkdir(parents=True, exist_ok=True)
    if options.steps:
        size, results = Size(options.steps * BATCH, options.steps * BATCH, (0,)), options.work / "trial.jsonl"
    if not (options.work / "both.npz").exists():
        prepare(options.work / "both.npz")
    cells = shared.read(results)

    def report() -> None:
        results.with_suffix(".md").write_text(table(size, cells))
        results.with_suffix(".png").write_bytes(plot(cells))

    with tempfile.TemporaryDirectory() as programs:
        one = Study(size, options.work, programs).run
        shared.go_on(results, cells, plan(size, cells), one, report, options.workers)
    print(table(size, cells))


if __name__ == "__main__":
    main()
