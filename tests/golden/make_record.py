"""Writes the golden record: what version 0.1.0 does, for tests/golden/record_test.py. Or compares bit for bit.

  python tests/golden/make_record.py      (at the commit of version 0.1.0 alone: its fields, its commands)

writes tests/golden/record: data; of each method the ids and digests of 20 batches, losses and other metrics of every
step, all parameters after step 20, and names, shapes and checksums of all that the checkpoint holds; workdirs that were
stopped at step 10, and what --mode=eval makes of them; cached batches, a vocabulary, clusters and exports. Everything
runs in that folder, whose configs name data by relative paths, with the XLA flags of tests/conftest.py.

  python tests/golden/make_record.py --compare --to=FOLDER         (before a change)
  python tests/golden/make_record.py --compare --against=FOLDER    (after it, on the same machine)

runs each method anew, resumes each workdir of the record and evaluates it, and says whether the result is equal to the
bit: ids, inputs, metrics, evaluations and every array of the checkpoint, the optimizer's state included. Without
--against, and without --to, the comparison is with the committed record, which has the bits of its own processor and of
those alike. --methods=mae,dino picks.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import conftest  # noqa: F401  sets the flags of XLA, before JAX is imported
from tests.golden import runs
from tests.golden.runs import METHODS, RECORD, STOP

SPLITS = {"data.train_split": "train[:75%]", "data.val_split": "train[75%:]"}
DECODER = {"method.decoder_width": 16, "method.decoder_depth": 1, "method.decoder_heads": 2}
COMMON = {
    "seed": 7, "batch_size": 8,
    "data.source": "npz", "data.path": "data/images.npz", "data.image_size": (16, 16), "data.threads": 2,
    "model.width": 16, "model.depth": 2, "model.heads": 2, "model.patch": (4, 4),
    # A large eps: gradients that are nearly zero must not make full steps of their rounding errors.
    "optim.lr": 0.016, "optim.warmup": "4 steps", "optim.eps": 1e-4,
    "train.duration": "20 steps", "checkpoint.every": "10 steps", "eval.every": "10 steps", "eval.max_examples": 24,
    "eval.knn_k": 5, "eval.pictures": 4, "log.every": "1 steps", "log.tensorboard": False,
}
FIELDS: dict[str, dict[str, Any]] = {  # method → its fields; between them what later versions rename or draw otherwise
    "mae": {**DECODER, **SPLITS, "data.colour": "jitter", "checkpoint.best": "loss"},
    "splitmask": {**DECODER, "method.vocabulary": 24, "method.vocabulary_file": "vocabulary.npz",
                  "method.normalise": False, "method.temperature": 1.0, "model.layer_scale": 0.1,
                  "model.drop_path": 0.1, "optim.name": "lamb", "optim.clip": 3.0, "model.pool": "mean"},
    "beit": {"method.vocabulary": 24, "method.target": "patches", "method.masked": 6, "model.positions": "learned",
             "data.colour": "three", "optim.clip": 3.0, "train.accumulate": 2},
    "dino": {"method.out_dim": 32, "method.head_width": 64, "method.bottleneck": 16, "method.local_views": 2,
             "method.local_size": (8, 8), "method.freeze_last": "3 steps", "method.temperature_warmup": "5 steps",
             "method.teacher_temperature": 0.2, "method.first_teacher_temperature": 0.3, "method.temperature": 0.5,
             "optim.clip": 3.0, "optim.lr": 0.004, "optim.final_weight_decay": 0.4, "guard.spike": 6.0},
    "mixedae": {**DECODER, "method.projection": 8, "model.pool": "mean", "optim.name": "lars", "optim.lr": 1.0,
                "eval.attention_query": "mean"},
    "moce": {**DECODER, **SPLITS, "method.experts": 3, "method.clusters": "clusters", "method.distill_weight": 0.1,
             "init_from": "exports/mae.safetensors"},
    "supervised": {**SPLITS, "method.mixup": 0.8, "method.cutmix": 1.0, "method.mix_group": 4, "data.colour": "rand",
                   "data.repeats": 2, "model.positions": "random", "model.pool": "mean", "optim.ema": 0.9,
                   "optim.layer_decay": 0.75},
    "segment": {"method.classes": 3, "method.train_blocks": 1, "data.source": "folder", "data.path": "data/images",
                "data.mask_key": "data/masks", "optim.name": "sgd", "optim.lr": 0.3},
}
EXPORTS = {  # file or folder → method, layout
    "mae.safetensors": ("mae", "mae_jax"), "mae_of_mae.safetensors": ("mae", "mae"),
    "mae_of_timm.safetensors": ("mae", "timm"), "mae_of_hf": ("mae", "hf"),
    "dino.safetensors": ("dino", "mae_jax"), "dino_of_timm.safetensors": ("dino", "timm"),
    "moce.safetensors": ("moce", "mae_jax"), "supervised_of_timm.safetensors": ("supervised", "timm"),
    "splitmask_of_timm.safetensors": ("splitmask", "timm"),
}
RECIPE = """import json
from mae_jax.config import from_dict

def get_config(arg):
    return from_dict(json.load(open(arg)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="compare, or with --to write what to compare with")
    parser.add_argument("--to", type=lambda text: Path(text).resolve(), help="folder to write")
    parser.add_argument("--against", type=lambda text: Path(text).resolve(), default=RECORD / "runs")
    parser.add_argument("--methods", default=",".join(METHODS))
    flags = parser.parse_args()
    if not flags.compare:
        make()
        return
    with contextlib.chdir(RECORD), tempfile.TemporaryDirectory() as scratch, cached(scratch):
        differ = [name for method in flags.methods.split(",")
                  for name in compared(method, Path(scratch), flags.to, flags.against)]
    sys.exit(f"{len(differ)} results differ" if differ else 0)


@contextlib.contextmanager
def cached(folder: str) -> Iterator[None]:
    """Keeps compiled programs, which the resumed run then finds."""
    import jax

    jax.config.update("jax_compilation_cache_dir", f"{folder}/xla")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield


def compared(method: str, scratch: Path, to: Path | None, against: Path) -> list[str]:
    """Makes a fresh and a resumed run and writes them to a folder, or prints how they differ from what is there.

    Returns the names of those that do.
    """
    differ = []
    fresh, resumed = scratch / method, scratch / f"{method}-resumed"
    shutil.copytree(f"workdirs/{method}", resumed)
    config, evaluation = runs.stored_config(resumed), evaluated(method, scratch)
    for workdir in (fresh, resumed):
        finish(config, workdir)
        if to:
            write(to, workdir.name, about(config, workdir, evaluation), workdir)
            print(f"{workdir.name}: written")
            continue
        own = (against / f"{workdir.name}.json").is_file()  # the committed record has the run of the fresh one alone
        wrong = differences(json.loads((against / f"{workdir.name if own else method}.json").read_text()),
                            about(config, workdir, evaluation))
        differ += [workdir.name] * bool(wrong)
        print(f"{workdir.name}: " + (f"differs in {'; '.join(wrong)}" if wrong else "equal to the bit"), flush=True)
    return differ


def finish(config: Any, workdir: Path) -> None:
    """Trains or resumes to the end, with what it prints left out."""
    with contextlib.redirect_stdout(None):
        code = runs.train(config, workdir)
    if code:
        raise RuntimeError(f"{workdir} ended with {code}")


def evaluated(method: str, scratch: Path) -> dict[str, float | None]:
    """Returns what --mode=eval makes of the stopped workdir of a method."""
    workdir = scratch / f"{method}-evaluated"
    shutil.copytree(f"workdirs/{method}", workdir)
    with contextlib.redirect_stdout(None):
        runs.evaluate(workdir)
    return {name: value for name, value in runs.metrics(workdir)[str(STOP)].items() if name.startswith("eval/")}


def about(config: Any, workdir: Path, evaluation: dict[str, float | None]) -> dict[str, Any]:
    """Returns the record of a finished run and of the evaluation of the stopped one."""
    return runs.inputs(config) | runs.measured(workdir) | {"evaluated": evaluation}


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Returns in which parts two records differ, with the first names in each."""
    texts = []
    for part in wanted:
        one, other = wanted[part], found[part]
        if one == other:
            continue
        if isinstance(one, list):
            one, other = dict(enumerate(one)), dict(enumerate(other))
        names = [str(name) for name in {**one, **other} if one.get(name) != other.get(name)]
        texts.append(f"{part} ({len(names)}: {', '.join(names[:3])})")
    return texts


def write(folder: Path, name: str, record: dict[str, Any], workdir: Path) -> None:
    """Writes the record of a finished run as <name>.json, and the values of its parameters as <name>.npz."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(as_text(record))
    np.savez_compressed(folder / f"{name}.npz", **runs.saved(workdir))


def as_text(record: dict[str, Any]) -> str:
    """Returns JSON with a line for each batch, each step and each item."""
    parts = []
    for part, content in record.items():
        lines = [json.dumps(each) for each in content] if isinstance(content, list) else [
            f"{json.dumps(name)}: {json.dumps(each)}" for name, each in content.items()]
        opening, closing = "[]" if isinstance(content, list) else "{}"
        parts.append(f'"{part}": {opening}\n' + ",\n".join(lines) + f"\n{closing}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


# From here on: the making of the record, with the code of version 0.1.0 alone.


def make() -> None:
    """Writes the whole record; in the order in which its parts need each other."""
    shutil.rmtree(RECORD, ignore_errors=True)
    RECORD.mkdir()
    with contextlib.chdir(RECORD), tempfile.TemporaryDirectory() as scratch, cached(scratch):
        make_data(Path("data"))
        recipe = Path(scratch) / "recipe.py"
        recipe.write_text(RECIPE)
        for method in ("mae", "splitmask", *(name for name in METHODS if name not in ("mae", "splitmask"))):
            config = made_config(method)
            stored = Path(scratch) / f"{method}.json"
            stored.write_text(json.dumps(config.to_dict()))
            if method == "splitmask":
                unfilled = Path(scratch) / "unfilled.json"
                unfilled.write_text(json.dumps(made_config(method, {"method.vocabulary_file": ""}).to_dict()))
                command("cluster", f"--config={recipe}:{unfilled}", "--to=vocabulary.npz")
                Path("vocabulary.png").unlink()
            make_runs(method, config, Path(scratch))
            if method == "mae":
                command("inspect", f"--config={recipe}:{stored}", "--write=batches", "--steps=4", "--to=batches")
                command("cluster", "--from=workdirs/mae", "--clusters=4", "--ratio=6", "--to=clusters")
                Path("clusters/clusters.png").unlink()
            for name, (of, layout) in EXPORTS.items():
                if of == method:
                    command("export", f"--from=workdirs/{method}", f"--layout={layout}", f"--to=exports/{name}")
        command("export", "--from=workdirs/moce", "--for-task=vote", f"--config={recipe}:{Path(scratch) / 'mae.json'}",
                "--to=exports/moce_for_task.safetensors")


def made_config(method: str, fields: dict[str, Any] | None = None) -> Any:
    """Returns the config of a method of the record."""
    from mae_jax.config import default, validate

    config = default(method)
    config.update_from_flattened_dict(COMMON | FIELDS[method] | (fields or {}))
    validate(config)
    return config


def make_runs(method: str, config: Any, scratch: Path) -> None:
    """Makes the uninterrupted run's record, and the workdir of a run that was stopped as by a signal."""
    from mae_jax.stop import STOPPED, Stopper

    whole, stopped = scratch / method, Path("workdirs") / method
    finish(config, whole)
    asked = Stopper.should_stop
    Stopper.should_stop = lambda self, step: step >= STOP
    try:
        with contextlib.redirect_stdout(None):
            code = runs.train(config, stopped)
    finally:
        Stopper.should_stop = asked
    if code != STOPPED:
        raise RuntimeError(f"{stopped} ended with {code}")
    for name in ("pictures", "compiled"):
        shutil.rmtree(stopped / name, ignore_errors=True)
    (stopped / "lock").unlink(missing_ok=True)
    for marker in stopped.rglob("commit_success.txt"):  # that it is there is read, and not the absolute path in it
        marker.write_text(marker.read_text().replace(f"{RECORD}/", ""))
    write(Path("runs"), method, about(config, whole, evaluated(method, scratch)), whole)
    print(f"{method}: written", flush=True)


def command(module: str, *flags: str) -> None:
    """Runs a command of the package in the record's folder, as a user would."""
    root = Path(__file__).parents[2]
    environment = dict(os.environ) | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-m", f"mae_jax.{module}", *flags], env=environment, check=True)


def make_data(folder: Path) -> None:
    """Writes smooth random images of three classes, 48 to train on and 16 to test, and 32 with masks in a folder."""
    rng = np.random.default_rng(2026)
    arrays: dict[str, np.ndarray] = {}
    for split, size in (("train", 48), ("test", 16)):
        labels = np.arange(size) % 3
        arrays[f"x_{split}"], arrays[f"y_{split}"] = smooth(rng, labels), labels
    folder.mkdir()
    np.savez_compressed(folder / "images.npz", **arrays)
    for split, size in (("train", 24), ("test", 8)):
        for number, image in enumerate(smooth(rng, np.arange(size) % 3)):
            red, green = image[..., 0].astype(int), image[..., 1].astype(int)
            classes = np.where(red > green + 20, 1, np.where(green > red + 20, 2, 0)).astype(np.uint8)
            classes[:2] = 255
            for kind, pixels in (("images", image), ("masks", classes)):
                file = folder / kind / split / f"{number:02d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)


def smooth(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Returns images uint8 [n, 20, 20, 3] whose neighboring pixels are alike; the label shifts their colors."""
    walks = rng.normal(size=(len(labels), 20, 20, 3)).cumsum(1).cumsum(2) * 4
    shifts = np.array([[40, 0, -40], [-40, 40, 0], [0, -40, 40]])[labels][:, None, None]
    return (walks - walks.mean((1, 2), keepdims=True) + 128 + shifts).clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
