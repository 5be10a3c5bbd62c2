"""Scenes of colored shapes whose boxes, classes and masks are known; for the tests of detection."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.ops.detection.crops import CROP, PACKED, pack
from mae_jax.ops.patches import PatchGrid

GRAY = (124, 116, 104)
COLORS = np.array([(230, 40, 40), (40, 200, 60), (60, 80, 240)])


def shape(kind: int, height: int, width: int) -> np.ndarray:
    """Returns the mask bool [height, width] of a class: 0 a rectangle, 1 an ellipse, 2 a triangle."""
    y, x = (np.indices((height, width)) + 0.5) / np.array([height, width])[:, None, None]
    return [np.ones_like(x, bool), (2 * x - 1) ** 2 + (2 * y - 1) ** 2 <= 1, x <= y][kind]


def scenes(config: ConfigDict, seed: int = 0, objects: int | None = None, classes: int = 3) -> dict[str, np.ndarray]:
    """Returns the fields of images, objects and sizes of a batch of method.name=detection.

    Objects do not overlap: each has its own quarter of the image.

    Args:
      config: of a detector.
      seed: of the draws.
      objects: of each image; None: 1 to 3.
      classes: at most 3.
    """
    rng, grid, most = np.random.default_rng(seed), PatchGrid.of(config), config.data.max_objects
    count, (height, width) = config.batch_size, grid.image_size
    found: dict[str, Any] = {
        "box": np.zeros((count, most, 4), np.float32), "box_class": np.zeros((count, most), np.int32),
        "box_valid": np.zeros((count, most), np.float32), "box_mask": np.zeros((count, most, PACKED), np.uint8),
        "size": np.tile(np.array([height, width], np.int32), (count, 1))}
    images = np.zeros((count, height, width, 3), np.uint8) + np.array(GRAY, np.uint8)
    for row in range(count):
        quarters = rng.permutation(4)[:objects if objects is not None else rng.integers(1, 4)]
        for place, quarter in enumerate(quarters):
            kind = int(rng.integers(classes))
            tall, wide = (int(rng.integers(side // 4, side // 2 + 1)) for side in (height, width))
            y = quarter // 2 * (height // 2) + int(rng.integers(height // 2 - tall + 1))
            x = quarter % 2 * (width // 2) + int(rng.integers(width // 2 - wide + 1))
            images[row, y:y + tall, x:x + wide][shape(kind, tall, wide)] = COLORS[kind]
            found["box"][row, place] = x, y, x + wide, y + tall
            found["box_class"][row, place], found["box_valid"][row, place] = kind, 1
            found["box_mask"][row, place] = pack(shape(kind, CROP, CROP))
    patches = np.stack([grid.patchify(image) for image in images])
    order = np.tile(np.arange(grid.num_patches, dtype=np.int32), (count, 1))
    return found | {"original_size": found["size"].copy(), "patches": patches, "order": order}


def scene_batch(config: ConfigDict, seed: int = 0, objects: int | None = None,
                classes: int = 3) -> dict[str, np.ndarray]:
    """Returns a whole batch of `scenes`, all valid."""
    count = config.batch_size
    return scenes(config, seed, objects, classes) | {
        "id": np.arange(count, dtype=np.int32), "valid": np.ones(count, np.float32),
        "replaced": np.zeros(count, np.int32)}
