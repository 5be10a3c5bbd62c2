"""One thing of each kind that plug-ins add: tests install this package in a folder of their own."""

import sys

print("handmade.things is being imported", file=sys.stderr)  # what tests compare the order of

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from mae_jax.data.sources.base import Example, Source
from mae_jax.data.sources.splits import Split
from mae_jax.interop.layouts import Layout
from mae_jax.methods.base import Batch, Extras, Metrics, Params
from mae_jax.methods.mae import MAE
from mae_jax.param_tree import flatten, nest


class Echo(MAE):
    """MAE whose loss has a weight, and which says how bright its images are."""

    defaults = {**MAE.defaults, "weight": 2.0}

    def loss(self, params: Params, extras: Extras, batch: Batch, key: jax.Array, step: jax.Array,
             train: bool) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        value, (metrics, extras) = super().loss(params, extras, batch, key, step, train)
        valid = batch["valid"]
        bright = (batch["patches"].astype("float32").mean((1, 2)) * valid).sum()
        return value * self.config.method.weight, ({**metrics, "brightness": (bright, valid.sum())}, extras)


def dark(data: ConfigDict, split: Split) -> Source:
    """64 images, 10 or 20 of 255 bright."""
    return Source(64, lambda i: Example(np.full((16, 16, 3), 10 + 10 * (i % 2), np.uint8)),
                  lambda i: f"{split.name}[{i}]").sliced(split)


def negative(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Inverts the colors: what is dark becomes 235 or 245 bright."""
    return ImageOps.invert(image)


def _to(params: Params, config: ConfigDict) -> dict[str, np.ndarray]:
    return {f"hand.{name.replace('/', '.')}": np.asarray(value) for name, value in flatten(params).items()}


def _from(state: dict[str, np.ndarray], config: ConfigDict | None) -> Params:
    return nest({name.removeprefix("hand.").replace(".", "/"): value for name, value in state.items()})


HAND = Layout(_to, _from, recognizes=lambda names: all(name.startswith("hand.") for name in names),
              describe=lambda config, state: f"made by hand of {config.method.name}")
