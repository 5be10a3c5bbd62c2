"""Training examples for data.resize=graph, which makes the patches of many JPEGs in one call.

Draws, and so ids, boxes, flips and orders, are those of data.resize=exact; pixels differ by rounding. Images that the
graph cannot decode are made as for exact.
"""

import logging
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data import masking
from mae_jax.data.decode import StoredImage
from mae_jax.data.image_bounds import BadImage
from mae_jax.data.sources.base import Example, Source
from mae_jax.data.transforms import sampling
from mae_jax.data.transforms.example import ExampleBuilder, Fields, Spec
from mae_jax.errors import UserError
from mae_jax.rng import rng

if TYPE_CHECKING:
    from mae_jax.data.transforms import graph

log = logging.getLogger(__name__)
_EXACT = "take data.resize=exact or fast"


class GraphBuilder(ExampleBuilder):
    """Makes the fields of `ExampleBuilder`, for many examples at once."""

    def __init__(self, config: ConfigDict, order: masking.PatchOrder, spec: Spec, views: tuple[masking.View, ...] = ()):
        check(config, spec, views)
        super().__init__(config, order, spec, views)
        from mae_jax.data.transforms import graph  # imports TensorFlow, and fails early without it

        self._patches, self._job_of = graph.patches, graph.Job  # pickled: the fork server imports them

    def look_at(self, source: Source) -> None:
        """Raises UserError if images are not encoded files; warns if they are not plain JPEGs, by the first one."""
        try:
            image = source.read(0).image
            if isinstance(image, np.ndarray):
                raise UserError(f"data.resize='graph' decodes JPEGs, and data.source={self._config.data.source!r} has "
                                f"pixels; {_EXACT}")
            stored = StoredImage(image, reading=self._reading)
        except (BadImage, OSError):
            return
        if not stored.plain_jpeg:
            log.warning("data.resize=graph is for JPEGs that nothing turns; %s is none: what is none is made as "
                        "data.resize=exact makes it, and no faster", source.name(0))

    def train_many(self, items: list[tuple[Example, int]]) -> list[Fields | BadImage]:
        """Returns the result of `train` for each example and position of the run, or the BadImage that it raises."""
        results: list[Fields | BadImage | None] = [None] * len(items)
        jobs = {}
        for place, (example, position) in enumerate(items):
            try:
                stored = StoredImage(example.image, reading=self._reading)
            except BadImage as error:
                results[place] = error
                continue
            if stored.plain_jpeg:
                jobs[place] = self._job(example.image, stored, position)
        for place, made in zip(jobs, self._made([job for job, _ in jobs.values()]), strict=True):
            if made is not None:
                results[place] = {**self._labels(items[place][0]), "patches": made, **jobs[place][1]}
        return [self._exact(*item) if result is None else result for item, result in zip(items, results, strict=True)]

    def _exact(self, example: Example, position: int) -> Fields | BadImage:
        try:
            return self.train(example, position)
        except BadImage as error:
            return error

    def _job(self, data: bytes, stored: StoredImage, position: int) -> "tuple[graph.Job, dict[str, np.ndarray]]":
        """Returns the graph's arguments for a JPEG, and the fields of its order."""
        drawn, size = self._drawn(self._config.seed, "order", position), (stored.height, stored.width)
        axes = sampling.draw(rng(self._config.seed, "augment", position), size, self._config)
        ratio = sampling.ratio(*axes)
        if ratio > 1:
            axes, size = tuple(axis.shrunk(ratio) for axis in axes), tuple(-(-side // ratio) for side in size)
        (top, height), (left, width) = (axis.window(side) for axis, side in zip(axes, size, strict=True))
        rows, columns = axes
        return self._job_of(
            data, (top, left, height, width), ratio, (rows.centers - top).astype(np.float32),
            (columns.centers - left).astype(np.float32), (rows.scale, columns.scale),
            (max(rows.low - top, 0), min(rows.high - top, height), max(columns.low - left, 0),
             min(columns.high - left, width)), drawn["order"]), drawn

    def _made(self, jobs: "list[graph.Job]") -> list[np.ndarray | None]:
        """Returns the patches of each JPEG, uint8 [N, P]; None for those that do not decode."""
        from mae_jax.data.tensorflow_cpu import tf

        if not jobs:
            return []
        try:
            return list(self._patches(self._grid, jobs))
        except tf.errors.ResourceExhaustedError as error:
            raise MemoryError(f"while images were decoded: {error.message[:120]}") from None
        except tf.errors.InvalidArgumentError:  # the error does not say which JPEG failed
            return [None] if len(jobs) == 1 else [self._made([job])[0] for job in jobs]


def check(config: ConfigDict, spec: Spec, views: tuple[masking.View, ...]) -> None:
    """Raises UserError for a recipe that the graph does not support."""
    data, method = config.data, config.method.name
    if data.augment == "scaled":
        raise UserError(f"data.resize='graph' has no data.augment='scaled'; {_EXACT}, or another augmentation")
    if data.color != "none":
        raise UserError(f"data.resize='graph' has no data.color={data.color!r}; {_EXACT}, or data.color=none")
    if views:
        raise UserError(f"data.resize='graph' makes one view of an image, and method.name={method!r} trains on "
                        f"several; {_EXACT}")
    if "pixel_label" in spec:
        raise UserError(f"data.resize='graph' has no masks of classes, on which method.name={method!r} trains; "
                        f"{_EXACT}")


def builder(config: ConfigDict, order: masking.PatchOrder, spec: Spec, views: tuple[masking.View, ...]
            ) -> ExampleBuilder:
    """Returns the example builder for data.resize."""
    return (GraphBuilder if config.data.resize == "graph" else ExampleBuilder)(config, order, spec, views)
