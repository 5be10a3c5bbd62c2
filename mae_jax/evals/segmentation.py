"""Segmentation metrics and images: mIoU, pixel accuracy, predicted masks, at the model's image size."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from PIL import Image, ImageDraw, ImageFont

from mae_jax.errors import printable
from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context
from mae_jax.evals.image_grid import CAPTION, GAP, LETTER, fitting, paired, tile
from mae_jax.losses.segmentation import IGNORED
from mae_jax.methods.base import Batch, Method

CREAM = (224, 224, 192)  # color of ignored pixels, as in PASCAL VOC
MAX_LISTED_CLASSES, KEY = 32, 44  # maximum number of classes of a legend; minimum width of its columns, screen pixels
CAPTIONS = ("input", "truth", "prediction") * 2


class Segmentation(Evaluation):
    """The metrics of `summary` over all pixels of the part, and the image of `pictures`.

    They use the model's image size and the evaluation's crop, and are not comparable with metrics at the original size.
    """

    name = "segmentation"

    def applies(self, method: Method, data: Any) -> bool:
        return method.task == "segmentation"

    def metric_names(self, method: Method, data: Any) -> list[str]:
        return ["miou", "pixel_accuracy"]

    def counts(self, method: Method, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        logits, classes = (x.reshape(len(x), -1, *x.shape[3:]) for x in (outputs, method.pixel_classes(batch)))
        return {"pixels": confusion(logits, classes, batch["valid"])}

    def scalars(self, ctx: Context) -> dict[str, float]:
        found = ctx.held_out.counts
        return summary(found["pixels"]) if found else {}

    def images(self, ctx: Context) -> Iterator[tuple[str, np.ndarray]]:
        yield "segment", pictures(ctx.method, ctx.params, ctx.extras, ctx.shown, ctx.shown_names,
                                  ctx.data.classes)


@functools.lru_cache(maxsize=8)
def _predictor(method: Method) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns a compiled function of (params, extras, batch) → true and predicted classes, uint8 [B, height, width]."""
    def predict(params: Any, extras: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return method.pixel_classes(batch), method.pixel_logits(params, extras, batch).argmax(-1).astype(jnp.uint8)

    return jax.jit(predict)


def pictures(method: Method, params: Any, extras: Any, batch: Batch, names: Sequence[str] = (),
             classes: Sequence[str] = ()) -> np.ndarray:
    """Draws input, true and predicted classes of each image, and a legend for at most MAX_LISTED_CLASSES classes.

    Args:
      method, params, extras: a segmentation method and its state.
      batch: unmasked images.
      names: captions of the images.
      classes: names of the pixel classes; if their number differs from the method's, the legend has numbers.

    Returns:
      uint8 [height, width, 3].
    """
    truth, predicted = process_allgather(_predictor(method)(params, extras, batch), tiled=True)
    inputs = method.grid.unpatchify(np.asarray(batch["patches"]), np.asarray(batch["order"]))
    count = method.classes
    colors = palette(count)
    rows = list(zip(inputs, colors[truth], colors[predicted], strict=True))
    picture = tile(paired(rows), CAPTIONS, f"Segmentation: {count} classes of pixels; what is cream does not count",
                   below=names)
    if count > MAX_LISTED_CLASSES:
        return picture
    return np.concatenate([picture, legend(count, classes, picture.shape[1])])


def legend(count: int, classes: Sequence[str], width: int) -> np.ndarray:
    """Draws the colors of `count` classes with their names, or numbers without names; uint8 [height, width, 3]."""
    colors = palette(count)[:count]
    names = [printable(name) for name in classes] if len(classes) == count else [str(k) for k in range(count)]
    font = ImageFont.load_default(LETTER)
    longest = math.ceil(max(map(font.getlength, names)))
    column = min(max(KEY, CAPTION + longest + 2 * GAP), width - GAP)
    across = max(1, (width - GAP) // column)
    canvas = Image.new("RGB", (width, -(-len(colors) // across) * CAPTION + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (color, name) in enumerate(zip(colors, names, strict=True)):
        x, y = GAP + number % across * column, number // across * CAPTION
        draw.rectangle((x, y + 2, x + CAPTION - 6, y + CAPTION - 4), fill=tuple(map(int, color)), outline="black")
        draw.text((x + CAPTION, y + 2), fitting(name, column - CAPTION, font), "black", font)
    return np.asarray(canvas)


def palette(classes: int) -> np.ndarray:
    """Returns a color for each value of a mask, uint8 [256, 3]: class 0 is black, ignored pixels are cream.

    PASCAL VOC's color map: the bits of the class number, lowest first, become the highest bits of red, green and blue
    in turn, so that successive classes have distinct colors.
    """
    numbers = np.arange(256)
    channels = [sum((numbers >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
    colors = np.stack(channels, 1).astype(np.uint8)
    colors[classes:] = CREAM
    colors[IGNORED] = CREAM
    return colors


CHUNK = 4096  # pixels per image that are counted at a time, to bound the size of the one-hot arrays


def confusion(logits: jax.Array, mask: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns the confusion matrix of a batch; integers, and so exact on any number of devices.

    Ties between logits go to the class of the lower index.

    Args:
      logits: float [B, M, C] of M pixels, fewer than 2**24.
      mask: integers [B, M], the true classes; pixels with 255, or any value not below C, do not count.
      valid: float32 [B], 0 for a row without an image.

    Returns:
      int32 [C, C], true classes as rows, predicted classes as columns. Sums over batches can need int64.
    """
    (images, pixels), classes = mask.shape, logits.shape[-1]
    truth = jnp.where((valid > 0)[:, None], mask.astype(jnp.int32), classes)
    predicted = logits.argmax(-1)
    chunk = min(CHUNK, pixels)

    def count(pictures: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        # The last chunk starts earlier to stay in range, and skips pixels that the previous one has counted.
        begin = jnp.minimum(start, pixels - chunk)
        new = begin + jnp.arange(chunk) >= start
        labels, guesses = (jax.lax.dynamic_slice_in_dim(x, begin, chunk, 1) for x in (truth, predicted))
        hot = jax.nn.one_hot(jnp.where(new, labels, classes), classes), jax.nn.one_hot(guesses, classes)
        # The float32 product per image is exact below 2**24; a scatter-add would be slow on TPUs.
        return pictures + jnp.einsum("bmt,bmp->btp", *hot), None

    start = jnp.zeros((images, classes, classes), jnp.float32)
    pictures, _ = jax.lax.scan(count, start, jnp.arange(0, pixels, chunk))
    return pictures.astype(jnp.int32).sum(0)


def iou(matrix: np.ndarray) -> np.ndarray:
    """Returns the IoU of each class, float64 [C], of a confusion matrix [C, C]; NaN for a class that does not occur."""
    both = np.diag(matrix)
    either = matrix.sum(0) + matrix.sum(1) - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def summary(matrix: np.ndarray) -> dict[str, float]:
    """Returns 'miou' and 'pixel_accuracy' in 0..1 of a summed confusion matrix [C, C]; NaN without counts.

    The mean IoU is over the classes that occur in truth or prediction.
    """
    found = iou(matrix)
    found = found[~np.isnan(found)]
    return {"miou": float(found.sum() / (len(found) or np.nan)),
            "pixel_accuracy": float(np.trace(matrix) / (matrix.sum() or np.nan))}
