"""Turns a stored image into the fields of one example: augmented, patchified, permuted."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data import masking
from mae_jax.data.decode import IGNORED, StoredImage, opencv
from mae_jax.data.reading import Reading
from mae_jax.data.sources.base import UNLABELED, Example
from mae_jax.data.transforms import detection
from mae_jax.data.transforms.color import policy
from mae_jax.data.transforms.crop import augment, augment_view, center
from mae_jax.errors import UserError
from mae_jax.ops.patches import PatchGrid
from mae_jax.rng import rng

if TYPE_CHECKING:
    import jax

GRAY = 127  # pixel value of the stand-in for unreadable images
Fields = dict[str, np.ndarray | int | float]


class FieldSpec(NamedTuple):
    """Shape and dtype of a batch field, like `jax.ShapeDtypeStruct`, without importing JAX."""

    shape: tuple[int, ...]
    dtype: Any


Spec = Mapping[str, "jax.ShapeDtypeStruct | FieldSpec"]


class ExampleBuilder:
    """Makes the fields `patches` uint8 [N, P], `order` int32 [N] and `label` of examples.

    N patches of P values: rows of the patch, pixels in the row, channels (fastest). If the order has blocks, also
    `blocks` int32 [M, K], indices in the order (`masking.draw`). If the spec has them, also `labels` uint8 [C] and
    `pixel_label` uint8 [N, P / 3], the class of each pixel of the same patches, or the objects of images, which then
    lie on a canvas (`detection.fields`). If a method has views of its own, training has their fields in place of
    patches, order and blocks (`masking.View`).
    """

    def __init__(self, config: ConfigDict, order: masking.PatchOrder, spec: Spec, views: tuple[masking.View, ...] = ()):
        for each in (order, *(view.order for view in views)):
            masking.check(each)
        self._config, self._order, self._views = config, order, views
        self._spec = {name: FieldSpec(tuple(struct.shape), np.dtype(struct.dtype)) for name, struct in spec.items()}
        self._grid, self._reading = PatchGrid.of(config), Reading.of(config.data)
        self.group = order.group  # neighboring rows that share a permutation
        self._most = self._spec["box"].shape[1] if "box" in self._spec else 0  # objects per image
        policy(config.data.color)  # fails early if it is unknown
        if self._most:
            detection.check(config)
        elif config.data.augment in detection.AUGMENT and config.data.augment != "none":
            raise UserError(f"data.augment={config.data.augment!r} is of images with objects; method.name="
                            f"{config.method.name!r} takes fixed, simple, single, random or none")
        if config.data.resize == "fast":
            opencv()  # likewise

    def train(self, example: Example, position: int) -> Fields:
        """Returns the augmented view, or views, for a position of the run; raises BadImage."""
        if self._views:
            stored = StoredImage(example.image, reading=self._reading)
            return {**self._labels(example), **self._several(stored, position)}
        stored = StoredImage(example.image, self._config.data.resize == "fast", self._reading)
        draws, drawn = rng(self._config.seed, "augment", position), self._drawn(self._config.seed, "order", position)
        if self._most:
            pixels, found = detection.augment(stored, example.objects, draws, self._config, self._most)
            return {**self._labels(example), **found, **self._cut(pixels, None, drawn)}
        pixels, mask = augment(stored, draws, self._config, self._mask(example))
        return {**self._labels(example), **self._cut(pixels, mask, drawn)}

    def evaluate(self, example: Example, index: int, position: int, ratio: float) -> Fields:
        """Returns the evaluation's view: the central `ratio`, or the whole image if it has objects.

        The order depends only on the example's index, or on its position if orders are drawn per group.

        Raises:
          BadImage: the image, or its mask, cannot be used.
        """
        stored = StoredImage(example.image, reading=self._reading)
        drawn = self._drawn(0, "evaluate", index if self._order.group == 1 else position)
        if self._most:
            pixels, found = detection.evaluate(stored, example.objects, self._config, self._most)
            return {**self._labels(example), **found, **self._cut(pixels, None, drawn)}
        pixels, mask = center(stored, self._config, ratio, self._mask(example))
        return {**self._labels(example), **self._cut(pixels, mask, drawn)}

    def gray_train(self, position: int) -> Fields:
        """Returns the fields of a gray stand-in for an unreadable image at a position of the run."""
        if not self._views:
            return self._gray(self._drawn(self._config.seed, "order", position))
        stored = StoredImage(np.full((1, 1, 3), GRAY, np.uint8))
        return {**self._several(stored, position), "label": UNLABELED, "valid": 0.0}

    def gray(self, position: int) -> Fields:
        """Returns the fields of a gray stand-in in an evaluation, for an unreadable image or as padding."""
        return self._gray(self._drawn(0, "evaluate", position))

    def _gray(self, drawn: dict[str, np.ndarray]) -> Fields:
        size = self._grid.image_size
        mask = np.full(size, IGNORED, np.uint8) if "pixel_label" in self._spec else None
        fields = self._cut(np.full((*size, 3), GRAY, np.uint8), mask, drawn)
        if "labels" in self._spec:
            fields["labels"] = np.zeros(self._spec["labels"].shape[1:], np.uint8)
        if self._most:
            fields |= detection.empty(size, self._most)
        return {**fields, "label": UNLABELED, "valid": 0.0}

    def _mask(self, example: Example) -> np.ndarray | None:
        return example.mask if "pixel_label" in self._spec else None

    def _labels(self, example: Example) -> Fields:
        return {"label": example.label, **({} if example.labels is None else {"labels": example.labels})}

    def _several(self, stored: StoredImage, position: int) -> Fields:
        """Returns the fields of all views of an image, which is decoded once; each crop has its own draws."""
        config, fields, number = self._config, {}, 0
        for kind in self._views:
            made, grid = [], PatchGrid(*kind.order.grid, *self._grid.patch)
            for colors in kind.colors:
                draws = rng(config.seed, "augment", position, number)
                pixels = augment_view(stored, draws, kind, colors, config.data)
                drawn = masking.draw(kind.order, rng(config.seed, "order", position, number))
                made.append({"patches": grid.patchify(pixels)[drawn["order"]], **drawn})
                number += 1
            fields |= {f"{kind.name}/{name}": np.stack([view[name] for view in made]) for name in made[0]}
        return fields

    def _drawn(self, seed: int, stream: str, position: int) -> dict[str, np.ndarray]:
        """Returns the order of the image at a position, and its blocks if any, as `masking.draw`."""
        group, member = divmod(position, self._order.group)
        return masking.draw(self._order, rng(seed, stream, group), member)

    def _cut(self, pixels: np.ndarray, mask: np.ndarray | None, drawn: dict[str, np.ndarray]) -> Fields:
        order = drawn["order"]
        masked = {} if mask is None else {"pixel_label": self._grid.patchify(mask[..., None])[order]}
        return {"patches": self._grid.patchify(pixels)[order], **drawn, **masked}
