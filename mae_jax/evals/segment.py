"""How well pixels are classified: counts on the devices, figures on the host."""

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 4096  # pixels of each picture that are counted at a time, so that the table of a class per pixel stays small


def confusion(logits: jax.Array, mask: jax.Array, valid: jax.Array) -> jax.Array:
    """Counts pixels by true class (down) and predicted class (across); whole numbers, exact on any number of devices.

    Of equal logits the class of the lower index is predicted.

    Args:
      logits: float [B, M, C] of M pixels, fewer than 2**24.
      mask: integers [B, M], the true classes; 255 and whatever else is not below C does not count.
      valid: float32 [B], 0 for a row that is no picture.

    Returns:
      int32 [C, C]. The sum over batches may need int64: `classify.add` takes it.
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
