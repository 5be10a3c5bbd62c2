"""Workdirs of runs that were not trained, and folders of images: made in a moment, for tests of what reads them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.config import default
from mae_jax.inference import embedding_files, parts
from mae_jax.methods.base import Extras
from mae_jax.storage.checkpoint import Checkpoints
from mae_jax.training import workdir
from tests.helpers.tiny import tiny_state

STEP = 6


def store_run(folder: Path, config: ConfigDict, classes: tuple[str, ...] = (), params: Any = None,
              extras: Extras | None = None) -> Path:
    """Writes config.json and a checkpoint of random parameters, or of those given; returns the workdir."""
    data = SimpleNamespace(num_train=8, classes=classes, identity=dict)
    workdir.record(epath.Path(folder), config, data)
    checkpoints = Checkpoints(folder, keep_last=2)
    state = tiny_state(config, extras)
    checkpoints.save(STEP, state._replace(step=jnp.asarray(STEP, jnp.int32), params=params or state.params))
    checkpoints.close()
    return folder


def store_images(folder: Path, classes: tuple[str, ...] = ("a", "b", "c"), count: int = 5, broken: int = 0) -> Path:
    """Writes PNGs of noise of many sizes into class folders, and files that are none; returns the folder."""
    draws = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            height, width = draws.integers(12, 40, 2)
            pixels = draws.integers(0, 256, (height, width, 3)) // 4 + 180 * (np.arange(3) == number % 3)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{k:02d}.png")
    for k in range(broken):
        (folder / classes[-1] / f"broken: {k}.png").write_bytes(b"no image")
    return folder


def store_features(to: Path, images: Path, width: int = 8, shape: tuple[int, ...] = ()) -> Path:
    """Writes features of the images in a folder as `embed` does, random around one center for each label."""
    part = parts.of_images(default(), str(images), ())
    label = np.array([part.source.label(k) for k in range(part.size)], np.int32)
    draws, classes = np.random.default_rng(1), part.source.classes
    centers = 3 * draws.normal(size=(len(classes) + 1, width))
    features = (centers[label] + draws.normal(size=(part.size, width))).astype(np.float32)
    features = np.broadcast_to(features[:, None], (part.size, int(np.prod(shape)), width)).reshape(part.size, -1)
    about = {"format": 1, "from": "runs/stored", "step": STEP, "features": "pool", "block": -1,
             "shape": (*shape, width), "image_size": (16, 16), "crop_ratio": 1.0, "source": {"images": str(images)},
             "classes": classes, "splits": [[part.split, part.size]], "examples": [part.source.digest()], "config": {},
             "images": part.size, "unreadable": [], "unreadable_count": 0}
    names = [classes[k] if k >= 0 else "" for k in label]
    rows = embedding_files.Record([part.name(k) for k in range(part.size)], part.split, np.arange(part.size), label,
                                  names, features)
    embedding_files.writer_of(epath.Path(to))(epath.Path(to), about, part.size, lambda: iter([rows]))
    return to
