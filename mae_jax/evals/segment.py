"""How well pixels are classified: per-patch logits to pixels, confusions, and attention maps as foreground."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def interpolation(cells: int, factor: int) -> np.ndarray:
    """Returns the float32 matrix [cells · factor, cells] that enlarges a side linearly.

    The centre of pixel i is (i + 1/2) / factor - 1/2 in cells; past the outermost centres the edge is repeated. This is
    what PyTorch calls bilinear without align_corners.
    """
    centres = np.clip((np.arange(cells * factor) + 0.5) / factor - 0.5, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(cells))).astype(np.float32)


def upsample(logits: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """Enlarges logits of patches [B, gh, gw, C] bilinearly to pixels float32 [B, gh · height, gw · width, C].

    Two small matrix products; `patch` is (height, width) in pixels.
    """
    rows, columns = (interpolation(cells, size) for cells, size in zip(logits.shape[1:3], patch, strict=True))
    # Products in bfloat16, the default of TPUs, would round the logits.
    tall = jnp.einsum("yh,bhwc->bywc", rows, logits.astype(jnp.float32), precision="highest")
    return jnp.einsum("xw,bywc->byxc", columns, tall, precision="highest")


def pixels_in_patch_order(pixels: jax.Array, patch: tuple[int, int]) -> jax.Array:
    """Cuts [B, height, width, C] into [B, N, p·p, C]: patches in raster order, and so the pixels in each.

    This is how masks [B, N, p·p] arrive under the identity order.
    """
    batch, height, width, channels = pixels.shape
    tiles = pixels.reshape(batch, height // patch[0], patch[0], width // patch[1], patch[1], channels)
    return tiles.swapaxes(2, 3).reshape(batch, -1, patch[0] * patch[1], channels)


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
    classes = jnp.arange(logits.shape[-1])
    truth = (mask[..., None] == classes) & (valid > 0)[:, None, None]
    predicted = logits.argmax(-1)[..., None] == classes
    # A product in float32, picture by picture, is exact below 2**24; a scatter-add would be slow on TPUs.
    pictures = jnp.einsum("bmt,bmp->btp", truth.astype(jnp.float32), predicted.astype(jnp.float32))
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


def foreground_iou(maps: np.ndarray, masks: np.ndarray, threshold: float) -> float:
    """Returns the mean over pictures of the IoU of maps ≥ threshold, float [n, height, width], with masks, bool.

    A picture with nothing in either counts as 1.
    """
    found = maps >= threshold
    both, either = (found & masks).sum((1, 2)), (found | masks).sum((1, 2))
    return float(np.where(either > 0, both / np.maximum(either, 1), 1.0).mean())


def best_threshold(maps: np.ndarray, masks: np.ndarray, candidates: Sequence[float]) -> float:
    """Returns the candidate of the highest `foreground_iou`, the first of several; for a validation part."""
    return float(candidates[int(np.argmax([foreground_iou(maps, masks, threshold) for threshold in candidates]))])
