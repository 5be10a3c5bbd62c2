"""From a stored picture to the fields of one example: augmented, cut into patches, permuted."""

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data import orders
from mae_jax.data.augment import augment, centre
from mae_jax.data.decode import Picture, opencv
from mae_jax.data.random import rng
from mae_jax.data.sources import UNLABELLED

GREY = 127  # every pixel of the picture that stands in where none could be read
Fields = dict[str, np.ndarray | int | float]


class Views:
    """Makes the fields `patches` uint8 [N, P] and `order` int32 [N] of examples.

    N patches of P values: rows of the patch, pixels in the row, channels (fastest).
    """

    def __init__(self, config: ConfigDict, order: orders.Order):
        orders.check(order)
        self._config, self._order = config, order
        self._patch = tuple(config.model.patch)
        if config.data.resize == "fast":
            opencv()  # says at once what is missing

    def train(self, picture: bytes | np.ndarray, position: int) -> Fields:
        """Returns the augmented view that belongs to a position of the run; raises BadPicture."""
        opened = Picture(picture, fast=self._config.data.resize == "fast")
        pixels, _ = augment(opened, rng(self._config.seed, "augment", position), self._config)
        return self._cut(pixels, rng(self._config.seed, "order", position))

    def evaluate(self, picture: bytes | np.ndarray, index: int) -> Fields:
        """Returns the evaluation's view; its order depends on the example's index alone; raises BadPicture."""
        pixels, _ = centre(Picture(picture), self._config, self._config.eval.crop_ratio[0])
        return self._cut(pixels, rng(0, "evaluate", index))

    def grey(self, draws: np.random.Generator) -> Fields:
        """Returns what stands in for a picture: for an unreadable one, and as padding of an evaluation."""
        pixels = np.full((*self._config.data.image_size, 3), GREY, np.uint8)
        return {**self._cut(pixels, draws), "label": UNLABELLED, "valid": 0.0}

    def _cut(self, pixels: np.ndarray, draws: np.random.Generator) -> Fields:
        order = orders.draw(self._order, draws)
        return {"patches": cut(pixels, self._patch)[order], "order": order}


def cut(pixels: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
    """Cuts uint8 [height, width, 3] into patches [N, P] in raster order."""
    height, width = pixels.shape[0] // patch[0], pixels.shape[1] // patch[1]
    tiles = pixels.reshape(height, patch[0], width, patch[1], 3).swapaxes(1, 2)
    return tiles.reshape(height * width, patch[0] * patch[1] * 3)
