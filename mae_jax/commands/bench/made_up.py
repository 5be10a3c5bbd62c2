"""Batches of random numbers, for measurements of the train step that read no data."""

from typing import Any

import jax
import numpy as np

OBJECTS = 7  # of an image: COCO's have 7.3 in the mean
SIDES = (0.05, 0.5)  # least and largest side of an object, as shares of the canvas


def batch(method: Any, spec: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Returns a batch of a method, by the shapes and dtypes of its fields; what is not known here is 0."""
    draws, made = np.random.default_rng(0), {}
    for name, s in spec.items():
        made[name] = np.ones(s.shape, s.dtype) if name == "valid" else np.zeros(s.shape, s.dtype)
        if name.endswith("patches"):
            made[name] = draws.integers(0, 256, s.shape, np.uint8)
        elif name == "cluster":
            made[name] = np.asarray(draws.integers(0, method.num_clusters, s.shape, s.dtype))
        elif name.endswith("order"):
            made[name] = draws.permuted(np.broadcast_to(np.arange(s.shape[-1], dtype=s.dtype), s.shape), axis=-1)
    if "box" in made:
        made |= _objects(made, method.config.data.image_size, method.classes, draws)
    return made


def _objects(made: dict[str, np.ndarray], canvas: tuple[int, int], classes: int, draws: np.random.Generator
             ) -> dict[str, np.ndarray]:
    """Returns the fields of OBJECTS objects on each image, which fills its canvas (height, width)."""
    images, most = made["box_class"].shape
    height, width = canvas
    low = draws.uniform(0, 1 - SIDES[1], (images, most, 2))
    corners = np.concatenate([low, low + draws.uniform(*SIDES, low.shape)], -1) * (width, height, width, height)
    valid = np.broadcast_to(np.arange(most) < OBJECTS, (images, most))
    size = np.broadcast_to(np.array(canvas, np.int32), (images, 2))
    return {"box": (corners * valid[..., None]).astype(np.float32), "box_valid": valid.astype(np.float32),
            "box_class": draws.integers(0, classes, (images, most), np.int32), "size": size, "original_size": size,
            "box_mask": draws.integers(0, 256, made["box_mask"].shape, np.uint8)}
