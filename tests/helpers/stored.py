"""Workdirs of runs that were not trained, and folders of images: made in a moment, for tests of what reads them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

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
