"""Segmentation metrics and images: mIoU, pixel accuracy, predicted masks."""

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

CREAM = (224, 224, 192)  # of pixels that count nowhere, as in the pictures of PASCAL VOC
MAX_LISTED_CLASSES, KEY = 32, 44  # classes up to which their colours are listed; screen pixels for each, at least
CAPTIONS = ("input", "truth", "prediction") * 2


class Segmentation(Evaluation):
    """The figures of `summary` over all pixels of the part, and `pictures`.

    At the model's size and under the evaluation's crop: not comparable with figures at the images' own size.
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
    """Returns the compiled function to true and predicted classes, uint8 [B, height, width]."""
    def predict(params: Any, extras: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return method.pixel_classes(batch), method.pixel_logits(params, extras, batch).argmax(-1).astype(jnp.uint8)

    return jax.jit(predict)


def pictures(method: Method, params: Any, extras: Any, batch: Batch, names: Sequence[str] = (),
             classes: Sequence[str] = ()) -> np.ndarray:
    """Returns the grid of `batch`: input, true and predicted classes, and a legend where these are few.

    Args:
      method, params, extras: what predicts.
      batch: of whole images.
      names: of the images.
      classes: of pixels, by name; otherwise they have numbers.
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
    """Returns the names of so many classes, or else their numbers, beside their colors, as uint8 [height, width, 3]."""
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
    """Returns a colour for each value of a mask, uint8 [256, 3]: class 0 is black, ignored pixels are cream.

    As in the pictures of PASCAL VOC: bits of the class number, lowest first, go to the highest bits of red, green and
    blue in turn, so that neighbours are far apart.
    """
    numbers = np.arange(256)
    channels = [sum((numbers >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
    colors = np.stack(channels, 1).astype(np.uint8)
    colors[classes:] = CREAM
    colors[IGNORED] = CREAM
    return colors


CHUNK = 4096  # pixels of each picture that are counted at a time, so that the table of a class per pixel stays small


def confusion(logits: jax.Array, mask: jax.Array, valid: jax.Array) -> jax.Array:
    """Counts pixels by true class (down) and predicted class (across); whole numbers, exact on any number of devices.

    Of equal logits the class of the lower index is predicted.

    Args:
      logits: float [B, M, C] of M pixels, fewer than 2**24.
      mask: integers [B, M], the true classes; 255 and whatever else is not below C does not count.
      valid: float32 [B], 0 for a row that is no picture.

    Returns:
      int32 [C, C]. The sum over batches may need int64.
    """
    (images, pixels), classes = mask.shape, logits.shape[-1]
    truth = jnp.where((valid > 0)[:, None], mask.astype(jnp.int32), classes)
    predicted = logits.argmax(-1)
    chunk = min(CHUNK, pixels)

    def count(pictures: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        # A chunk that would go past the end starts before it: what an earlier one has counted is left out.
        begin = jnp.minimum(start, pixels - chunk)
        new = begin + jnp.arange(chunk) >= start
        labels, guesses = (jax.lax.dynamic_slice_in_dim(x, begin, chunk, 1) for x in (truth, predicted))
        hot = jax.nn.one_hot(jnp.where(new, labels, classes), classes), jax.nn.one_hot(guesses, classes)
        # A product in float32, picture by picture, is exact below 2**24; a scatter-add would be slow on TPUs.
        return pictures + jnp.einsum("bmt,bmp->btp", *hot), None

    start = jnp.zeros((images, classes, classes), jnp.float32)
    pictures, _ = jax.lax.scan(count, start, jnp.arange(0, pixels, chunk))
    return pictures.astype(jnp.int32).sum(0)


def iou(matrix: np.ndarray) -> np.ndarray:
    """Returns float64 [C], pixels in truth and prediction over those in either; NaN for a class in neither."""
    both = np.diag(matrix)
    either = matrix.sum(0) + matrix.sum(1) - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def summary(matrix: np.ndarray) -> dict[str, float]:
    """Returns 'miou' and 'pixel_accuracy' in 0..1 of a summed confusion [C, C]; NaN where nothing was counted.

    The mean IoU is over the classes that occur in truth or prediction.
    """
    found = iou(matrix)
    found = found[~np.isnan(found)]
    return {"miou": float(found.sum() / (len(found) or np.nan)),
            "pixel_accuracy": float(np.trace(matrix) / (matrix.sum() or np.nan))}
