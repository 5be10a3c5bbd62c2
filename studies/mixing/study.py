"""Does naive mixing hurt MAE, and does MixedAE help it? The questions of arXiv 2303.17152, at a small size.

  scripts/fetch_clipart.sh runs/openclipart
  python studies/mixing/study.py --clipart=runs/openclipart       (resumes after an interruption)
  python studies/mixing/study.py --clipart=runs/openclipart --small=runs/small_clipart  (writes the drawings smaller)
  python studies/mixing/study.py --clipart=runs/small_clipart --size=gpu --workers=10  (cells at the same time; not run)

MAE, naive mixing (global attention, no contrast, no segments) and MixedAE are pre-trained on clip art and on photo
crops, with eight seeds, the same number of images and the same optimizer. `mae, longer` has MixedAE's training time
instead: its steps are MAE's times the ratio of their seconds per step, measured first, alternating, on an idle machine.
Ablations have one seed, on clip art. Encoders are evaluated by linear probe and k-NN of the last evaluation (test
split), by fine-tuning (main arms; the rate is chosen from three with seed 0 on a tenth of the training split), and on
clip art by a linear layer over patches (mIoU, test) and by the overlap of the mean patch's attention with the object
(IoU, test; head and threshold chosen on the training split). One more arm is the `untrained` encoder. Homology is also
reported before the first step; purity is also measured separately for queries of a single color and for the others.

All arms pool features as the mean of patches. Widths, depths, rates and durations are ours, for two cores. One of the
330 test images of clip art is 0.3 points, and 4 of them are byte for byte in the training split; the validation part of
photo crops overlaps the rest of the training split, not the test split. Verdicts are those of studies/verdicts.py,
corrected for some 30 comparisons; which differences matter is our choice. The committed cells have three seeds, too few
for a conclusion; another run adds seeds up to the eight of a verdict. One JSON line per cell is in results_<size>.jsonl
beside this file, the tables in .md, attention of the main arms on the same images in results_<size>_attention.png.

In the committed table, homology and reconstruction of mixes were measured again with the same weights after evaluations
began to mix shuffled images; the probes were not repeated.
"""

import argparse
import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.commands.bench.timed_step import TimedStep
from mae_jax.data.sources import clipart as sources_clipart
from mae_jax.errors import UserError
from mae_jax.evals import attention_maps
from mae_jax.ops.homologous_attention import purity
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import loop, workdir
from mae_jax.training import run as training_run

sys.path.insert(0, str(Path(__file__).parent))  # of arms.py
sys.path.insert(0, str(Path(__file__).parents[1]))  # of what the studies share
import cells as shared
from arms import ABLATIONS, ARMS, BATCH, LONGER, SETS, SIZES, Size, dense, finetuning, pretraining
from cells import Cell, matches, text
from verdicts import Comparison, judge
from verdicts import table as verdict_table

RESULTS = Path(__file__).parent
PURE = 0.35  # what purity should reach, r = 0.25; our choice
WAYS = {  # way to judge → kind of cell, its figure, the smallest difference that matters (our choice)
    "linear probe": ("pretrained", "probe", 0.02), "k-NN": ("pretrained", "knn", 0.02),
    "fine-tuned": ("tuned", "test", 0.02), "mIoU": ("dense", "miou", 0.01), "attention IoU": ("dense", "iou", 0.05)}
LRS = 1.2e-2, 2.4e-2, 4.8e-2  # rates of fine-tuning, of batches of 256


def plan(size: Size, cells: list[Cell]) -> Iterator[list[Cell]]:
    """Yields what is to be run, in order; the cells of a stage may run at the same time."""
    for name in SETS:
        yield [{"kind": "timed", "set": name}]
    trained = [{"set": name, "arm": arm, "seed": seed} for seed in size.seeds for name in SETS for arm in ARMS]
    trained += [{"set": name, "arm": LONGER, "seed": seed, "steps": longer(size, cells, name)}
                for seed in size.seeds for name in SETS]
    trained += [{"set": "clipart", "arm": arm, "seed": 0} for arm in ABLATIONS]
    yield [{"kind": "pretrained", **cell} for cell in trained]
    tuned = [{"kind": "tuned", "set": name, "arm": arm} for name in SETS for arm in ARMS]
    yield [{"kind": "dense", **cell} for cell in trained if cell["set"] == "clipart"] + [
        {"kind": "dense", "set": "clipart", "arm": "untrained", "seed": seed} for seed in size.seeds] + [
        {**known, "seed": 0, "lr": lr} for known in tuned for lr in LRS] + [
        {"kind": "colour", "set": name, "arm": "mixedae", "seed": seed} for name in SETS for seed in size.seeds]
    yield [{**known, "seed": seed, "lr": shared.chosen(cells, **known)} for known in tuned for seed in size.seeds[1:]]


def longer(size: Size, cells: list[Cell], name: str) -> int:
    """Returns the steps of MAE that take as long as MixedAE's."""
    [times] = [cell["ms"] for cell in cells if matches(cell, {"kind": "timed", "set": name})]
    return round(size.images // BATCH * times["mixedae"] / times["mae"])


def timed(name: str, clipart: str, size: Size) -> dict[str, float]:
    """Returns the milliseconds of each arm's train step: the median of alternating rounds of half a second."""
    arms = {arm: TimedStep(pretraining({"set": name, "arm": arm, "seed": 0}, clipart, size)) for arm in ARMS}
    rounds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(8):
        for arm, step in arms.items():
            began, steps = time.perf_counter(), 0
            while (passed := time.perf_counter() - began) < 0.5:
                step.run(step.batch)
                steps += 1
            rounds[arm].append(passed / steps)
    return {arm: round(1e3 * statistics.median(times[1:]), 3) for arm, times in rounds.items()}  # the first warms up


def run(cell: Cell, clipart: str, size: Size, work: Path, programs: str) -> Cell:
    """Trains a cell and returns it with what was measured; pre-trained encoders stay under `work`."""
    if cell["kind"] == "timed":
        return {**cell, "ms": timed(cell["set"], clipart, size), "device": jax.devices()[0].device_kind}
    encoder = work / f"{size.images}_{cell['set']}_{cell['arm'].replace(' ', '_')}_{cell['seed']}"
    if cell["kind"] != "pretrained" and cell["arm"] != "untrained" and not (encoder / "DONE").exists():
        _train(pretraining(cell, clipart, size), encoder, programs)  # that of an earlier call may be gone
    if cell["kind"] == "pretrained":
        _train(pretraining(cell, clipart, size), encoder, programs)
        first, last = shared.first_values(encoder), shared.last_values(encoder)
        kept = {name: value for name, value in last.items() if "purity" in name or name == "eval/neighbour_homology"}
        return {**cell, "probe": last["eval/linear/top1"], "knn": last["eval/knn/top1"],
                "untrained_probe": first["eval/linear/top1"],
                "reconstruction": last.get("eval/reconstruction_loss", last["eval/loss"]),
                "homology": kept, "untrained_homology": {name: first[name] for name in kept}}
    if cell["kind"] == "colour":
        return {**cell, **color(encoder, clipart)}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        if cell["kind"] == "tuned":
            last = _train(finetuning(cell, clipart, str(encoder)), Path(folder), programs)
            return {**cell, "val": last["val/top1"], "test": last["eval/top1"]}
        start = "" if cell["arm"] == "untrained" else str(encoder)
        last = _train(dense(cell, clipart, start, size), Path(folder), programs)
        return {**cell, "miou": last["eval/miou"], "iou": last["eval/attention_iou"],
                "floor": last["eval/foreground_share"]}


def opened(encoder: Path, clipart: str) -> tuple[Any, Any, Iterator[Any]]:
    """Returns the method and parameters of a workdir, and the batches of its test split."""
    config = workdir.read_config(encoder)
    if config.data.source == "clipart":
        config.data.path = clipart  # that of an earlier call may have moved
    run = training_run.prepare(config, encoder)
    return run.program.method, jax.device_get(load_params(encoder)), run.inputs.evaluate()


def color(encoder: Path, clipart: str) -> dict[str, float]:
    """Returns purity of queries that are patches of one color, and of the others, over all blocks and heads.

    Also that of keys chosen without an encoder, by the distance of the patches' mean colors.
    """
    method, params, batches = opened(encoder, clipart)

    @jax.jit
    def pure(batch: Any) -> jax.Array:
        """Returns the purity of queries [B / G, N], mean of blocks and heads."""
        found = [each.mean(1) for _, each in method.purities(params, batch)]
        return sum(found) / len(found)

    purities, plains, near = [], [], []
    for batch in batches:
        patches = method.mixed(np.asarray(batch["patches"]))
        whole = np.asarray(batch["valid"]).reshape(-1, method.group).min(1) > 0
        dots = patches.reshape(*patches.shape[:2], -1, 3)
        means = dots.mean(2)
        apart = np.linalg.norm(means[:, None] - means[:, :, None], axis=-1)
        near.append(np.asarray(purity(-apart[:, None], method.keep, method.group, method.patches))[whole])
        purities.append(np.asarray(pure({name: batch[name] for name in ("patches", "order")}))[whole])
        plains.append((dots == dots[:, :, :1]).all((-2, -1))[whole])
    found, plain = np.concatenate(purities), np.concatenate(plains)
    return {"share": float(plain.mean()), "plain": float(found[plain].mean()), "drawn": float(found[~plain].mean()),
            "near": float(np.concatenate(near).mean())}


def _train(config: ConfigDict, folder: Path, programs: str) -> dict[str, float]:
    config.train.compilation_cache = programs
    if loop.train(config, str(folder), alone=False):
        raise RuntimeError(f"{folder} did not finish")
    return shared.last_values(folder)


def values(cells: list[Cell], key: str, **what: Any) -> list[float]:
    """Returns a figure of an arm, one per seed; of fine-tunings, at the chosen rate."""
    return [*by_seed(cells, key, **what).values()]


def by_seed(cells: list[Cell], key: str, **what: Any) -> dict[int, float]:
    """Returns seed → figure of an arm, likewise."""
    found = [cell for cell in cells if matches(cell, what)]
    if what["kind"] == "tuned" and found:
        rate = shared.chosen(cells, **what)
        found = [cell for cell in found if cell["lr"] == rate]
    return shared.by_seed(found, key)


def table(size: Size, cells: list[Cell]) -> str:
    """Returns the Markdown: arms, homology per block beside the untrained encoder's, and what follows."""
    lines = [f"Pre-training shows {size.images:,} images; mean (range) of seeds. The reconstruction loss is that of "
             "the test split, of MixedAE and naive mixing from mixed images.", ""]
    for name in SETS:
        times = {arm: ms for cell in cells if matches(cell, {"kind": "timed", "set": name})
                 for arm, ms in cell["ms"].items()}
        lines += [f"**{name}**", "", "| arm | step time / MAE's | reconstruction loss | linear probe | k-NN | "
                  "fine-tuned | mIoU | attention IoU |", "|---" * 8 + "|"]
        for arm in (*ARMS, LONGER, *ABLATIONS, "untrained"):
            get = functools.partial(values, cells, set=name, arm=arm)
            losses, probes, nearest = (get(key, kind="pretrained") for key in ("reconstruction", "probe", "knn"))
            if arm == "untrained":
                probes = [cell["untrained_probe"] for cell in cells if matches(
                    cell, {"kind": "pretrained", "set": name, "arm": "mae"})]
            if not probes:
                continue
            share = text([times[arm] / times["mae"]] if arm in times else [], 2)
            lines.append(f"| {arm} | {share} | {text(losses)} | {text(probes)} | {text(nearest)} | "
                         f"{text(get('test', kind='tuned'))} | {text(get('miou', kind='dense'))} | "
                         f"{text(get('iou', kind='dense'))} |")
        if floor := values(cells, "floor", kind="dense", set=name, arm="untrained")[:1]:
            lines += ["", f"Taking every pixel has an attention IoU of {text(floor)}."]
        lines += ["", *homology(cells, name), ""]
    return "\n".join([*lines, "**Verdicts**", "", verdict_table(judge(comparisons(cells))), ""])


def homology(cells: list[Cell], name: str) -> list[str]:
    """Returns the lines of purity per block and neighbor homology, trained (untrained), and whether it is enough."""
    lines = ["Share of the K keys of the largest scores that are of the query's image (purity; by chance 0.25, and "
             "0.50 with r = 0.5), and of tokens whose nearest neighbor is; trained (untrained), mean of seeds:", ""]
    for arm in ("naive", "mixedae", *ABLATIONS):
        found = [cell for cell in cells if matches(cell, {"kind": "pretrained", "set": name, "arm": arm})]
        if not found:
            continue
        figures = [f"{key.removeprefix('eval/').replace('purity/block_', 'block ')} "
                   f"{np.mean([cell['homology'][key] for cell in found]):.2f} "
                   f"({np.mean([cell['untrained_homology'][key] for cell in found]):.2f})"
                   for key in sorted(found[0]["homology"])]
        lines.append(f"- {arm}: {', '.join(figures)}")
    mixedae = {"set": name, "arm": "mixedae"}
    purities = [cell["homology"]["eval/purity"] for cell in cells if matches(cell, {"kind": "pretrained", **mixedae})]
    if purities:
        lines += ["", f"Purity of MixedAE above {PURE}: {'reached' if min(purities) > PURE else 'not reached'}, "
                      f"{text(purities)}."]
    plain, drawn, share, near = (values(cells, key, kind="colour", **mixedae) for key in
                                 ("plain", "drawn", "share", "near"))
    if share:
        lines[-1] += (f" Of queries that are patches of one color, {text(share[:1], 2)} of all, it is {text(plain)}; "
                      f"of the others {text(drawn)}. The keys of the nearest mean colors, without an encoder, have "
                      f"{text(near[:1])}, the query's own and all ties among them.")
    return lines


def comparisons(cells: list[Cell]) -> list[Comparison]:
    """Returns what is asked: whether naive mixing hurts and MixedAE helps, by each way to judge."""
    questions = {"MAE above naive mixing": ("mae", "naive"), "MixedAE above MAE": ("mixedae", "mae"),
                 "MixedAE above MAE of the same time": ("mixedae", LONGER),
                 "MixedAE above naive mixing": ("mixedae", "naive")}
    found = []
    for name, (question, arms), (way, (kind, key, margin)) in itertools.product(SETS, questions.items(), WAYS.items()):
        higher, lower = (by_seed(cells, key, kind=kind, set=name, arm=arm) for arm in arms)
        if higher and lower:
            found.append(Comparison(f"{name}, {way}: {question}", higher, lower, margin))
    return found


def attention_picture(cells: list[Cell], work: Path, clipart: str, size: Size) -> np.ndarray | None:
    """Returns attention of the main arms side by side on the same held-out drawings; None before all.

    The seed is the one at which MAE's IoU is its median.
    """
    found = values(cells, "iou", kind="dense", set="clipart", arm="mae")
    seed = found.index(statistics.median_low(found)) if found else 0
    folders = {arm: work / f"{size.images}_clipart_{arm}_{seed}" for arm in ARMS}
    if not found or not all((folder / "DONE").exists() for folder in folders.values()):
        return None
    *_, batches = opened(folders["mixedae"], clipart)  # shuffled; another method's are in the order of their classes
    batch, pictures = {key: value[:8] for key, value in next(batches).items()}, []
    for arm, folder in folders.items():
        method, params, _ = opened(folder, clipart)
        ious = values(cells, "iou", kind="dense", set="clipart", arm=arm, seed=seed)
        pictures.append(attention_maps.picture(method, params, {}, batch, query="mean",
                                               name=f"{arm}, seed {seed}, best head's IoU {text(ious)}: "))
    return np.concatenate(pictures, 1)


def shrink(clipart: str, folder: Path) -> None:
    """Writes the usable drawings with a longest side of 128 pixels, the shortest at least 64: quick to decode."""
    from PIL import Image

    root = epath.Path(clipart or sources_clipart.FOLDER)
    for name in sources_clipart.pictures(root):
        with Image.open(root / name) as image:
            factor = min(1.0, max(128 / max(image.size), sources_clipart.SIDES[0] / min(image.size)))
            small = image.convert("RGBA").resize(tuple(round(side * factor) for side in image.size),
                                                 Image.Resampling.LANCZOS)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        small.save(folder / name, compress_level=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/mixing"), help="where pre-trained encoders stay")
    parser.add_argument("--clipart", default="", help="folder of openclipart's PNG files, where it is not installed")
    parser.add_argument("--workers", type=shared.positive, default=1, help="cells at once; --work must be kept")
    parser.add_argument("--small", type=Path, help="folder to write smaller clip art to, in place of the study")
    parser.add_argument("--steps", type=shared.positive, help="so few of pre-training: a trial, with results in --work")
    options = parser.parse_args()
    try:
        sources_clipart.pictures(epath.Path(options.clipart or sources_clipart.FOLDER))
    except UserError as error:
        parser.error(str(error))
    if options.small:
        shrink(options.clipart, options.small)
        return
    size, results = SIZES[options.size], RESULTS / f"results_{options.size}.jsonl"
    options.work.mkdir(parents=True, exist_ok=True)
    if options.steps:
        size, results = Size(options.steps * BATCH, 1, (0,)), options.work / f"trial_{options.steps}.jsonl"
    cells = shared.read(results)

    def report() -> None:
        results.with_suffix(".md").write_text(table(size, cells))

    with tempfile.TemporaryDirectory() as programs:
        one = functools.partial(run, clipart=options.clipart, size=size, work=options.work, programs=programs)
        shared.go_on(results, cells, plan(size, cells), one, report, options.workers)
    picture = attention_picture(cells, options.work, options.clipart, size)
    if picture is not None:
        from PIL import Image

        Image.fromarray(picture).save(results.with_name(f"{results.stem}_attention.png"))
    print(table(size, cells))


if __name__ == "__main__":
    main()
