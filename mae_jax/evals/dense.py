"""Dense predictions: scores over all pixels of a split, and pictures of them."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from mae_jax.evals.reconstruct import tile
from mae_jax.methods import Method
from mae_jax.methods.base import Batch, Metrics
from mae_jax.metrics import Means
from mae_jax.ops.layout import constrain
from mae_jax.ops.patches import assemble
from mae_jax.ops.segment import IGNORED, confusion
from mae_jax.step import TrainState, stream_key

GREY = 127  # of pixels that count nowhere
CAPTIONS = ("input", "truth", "prediction")


def scores(method: Method, state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
    """Returns the means of the loss's metrics, and 'miou', over all pixels of the batches, exact on any devices.

    At the model's size and under the evaluation's crop: not comparable with figures at the pictures' own size.
    """
    means, classes = Means(), method.config.method.classes
    table = np.zeros((classes, classes), np.int64)
    for batch in batches:
        counts, metrics = jax.device_get(_counter(method)(state, batch))
        means.add(metrics)
        table += counts
    return means.take("") | {"miou": miou(table)}


def miou(table: np.ndarray) -> float:
    """Returns the mean intersection over union of a confusion table [C, C], over classes that occur on either side."""
    union = table.sum(0) + table.sum(1) - table.diagonal()
    return float((table.diagonal()[union > 0] / union[union > 0]).mean()) if union.any() else 0.0


@functools.lru_cache(maxsize=8)
def _counter(method: Method) -> Callable[[TrainState, Batch], tuple[jax.Array, Metrics]]:
    """Returns the compiled function to a confusion table and metrics; kept from one evaluation to the next."""
    def count(state: TrainState, batch: Batch) -> tuple[jax.Array, Metrics]:
        params, key = state.ema or state.params, stream_key(method.config.seed, 0, "evaluate")
        _, (metrics, _) = method.loss(params, state.extras, batch, key, state.step, False)
        predicted = method.pixel_logits(params, state.extras, batch).argmax(-1)
        table = confusion(predicted, method.pixel_classes(batch), method.config.method.classes)
        return jax.tree.map(constrain, (table, metrics))

    return jax.jit(count)


@functools.lru_cache(maxsize=8)
def _predictor(method: Method) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns the compiled function to true and predicted classes, uint8 [B, height, width]."""
    def predict(params: Any, extras: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return method.pixel_classes(batch), method.pixel_logits(params, extras, batch).argmax(-1).astype(jnp.uint8)

    return jax.jit(predict)


def pictures(method: Method, params: Any, extras: Any, batch: Batch) -> np.ndarray:
    """Returns the grid of `batch`: input, true classes, predicted classes; grey is what counts nowhere."""
    truth, predicted = process_allgather(_predictor(method)(params, extras, batch), tiled=True)
    inputs = assemble(np.asarray(batch["patches"]), np.asarray(batch["order"]), method.grid, method.patch)
    colours = palette(method.config.method.classes)
    rows = list(zip(inputs, colours[truth], colours[predicted], strict=True))
    return tile(rows, CAPTIONS, f"{method.config.method.classes} classes of pixels")


def palette(classes: int) -> np.ndarray:
    """Returns a colour for each value of a mask, uint8 [256, 3]: class 0 is black, ignored pixels are grey.

    Neighbours are far apart: bits of the class number, lowest first, go to the highest bits of red, green and blue in
    turn, as in the pictures of PASCAL VOC.
    """
    numbers = np.arange(256)
    shifts = range(8)
    channels = [sum((numbers >> (3 * bit + channel) & 1) << (7 - bit) for bit in shifts) for channel in range(3)]
    colours = np.stack(channels, 1).astype(np.uint8)
    colours[classes:] = GREY
    colours[IGNORED] = GREY
    return colours
