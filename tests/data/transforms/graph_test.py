"""data.resize=graph: ids, boxes, flips and orders are those of exact, of every source; pixels lie close to PIL's."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_jax import config as configs
from mae_jax import data
from mae_jax.data.decode import StoredImage
from mae_jax.data.sources import photo_crops
from mae_jax.data.sources.base import Example
from mae_jax.data.transforms.graph_builder import GraphBuilder, builder
from mae_jax.errors import UserError
from mae_jax.methods import with_data
from tests.helpers import records
from tests.helpers.tiny import tiny_method


def config(**fields):
    c = configs.default()
    c.batch_size = 8
    c.data.update({"image_size": (32, 48), "threads": 2, "workers": "0", "eval_split": "", **fields})
    c.model.patch = (16, 16)
    return configs.resolved(c)


def photograph(name, **size):
    path = next(path for path in photo_crops._paths() if path.stem == name)
    image = Image.open(path).convert("RGB")
    return image.resize(size["size"], Image.Resampling.BICUBIC) if size else image


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 95, **options})
    return file.getvalue()


def inputs(c, resize, rows=None):
    c = c.copy_and_resolve_references()
    c.data.resize = resize
    method = with_data(tiny_method(c))
    return data.OpenedData(c, method.data_needs(c)).batches(method.batch_spec(), method.patch_order(), rows=rows)


PHOTOGRAPHS = [jpeg(photograph(name)) for name in ("chelsea", "coffee", "china", "motorcycle_left", "gravel")]
PHOTOGRAPHS += [jpeg(photograph("coffee"), subsampling=0), jpeg(photograph("chelsea").convert("L")),
                jpeg(photograph("china"), progressive=True), jpeg(photograph("astronaut", size=(30, 20)))]


def views(c, items):
    """Returns what graph makes of (image, position), and what exact makes."""
    method = with_data(tiny_method(c))
    made = []
    for resize in ("graph", "exact"):
        c.data.resize = resize
        made.append(builder(c, method.patch_order(), method.batch_spec(), ()))
    examples = [(Example(image), position) for image, position in items]
    return made[0].train_many(examples), [made[1].train(*each) for each in examples]
