"""Masks of objects: of what the host sends, what a mask head is trained for; and masks put back into an image."""

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops.detection.boxes import MIN_SIDE, sides
from mae_jax.ops.detection.crops import CROP
from mae_jax.ops.resampling import linear_weights

SAMPLES = 4  # per side of a target's cell: a box that is its object's has so many cells of a crop in it


def unpack(packed: jax.Array) -> jax.Array:
    """Returns bool [..., CROP, CROP] for uint8 [..., PACKED]."""
    bits = (packed[..., None] >> jnp.arange(7, -1, -1, jnp.uint8)) & 1
    return bits.reshape(*packed.shape[:-1], CROP, CROP).astype(bool)


def targets(crops: jax.Array, objects: jax.Array, proposals: jax.Array, side: int) -> jax.Array:
    """Returns what the mask head is trained for, float32 [R, side, side] of 0 and 1.

    It is the object's mask in its proposal: RoIAlign of the crop, and 0 outside it, from a half on (1703.06870, 3.1).

    Args:
      crops: bool [R, CROP, CROP], of the objects' masks.
      objects: float32 [R, 4], the boxes of these crops.
      proposals: float32 [R, 4].
      side: cells per side.
    """
    size = jnp.maximum(sides(objects), MIN_SIDE)
    scale = CROP / size
    begin = (proposals[:, :2] - objects[:, :2]) * scale
    step = sides(proposals) * scale / (side * SAMPLES)
    place = begin[..., None] + (jnp.arange(side * SAMPLES) + 0.5) * step[..., None] - 0.5  # [R, 2 (x, y), ...]
    x, y = linear_weights(place, CROP).reshape(*place.shape[:2], side, SAMPLES, CROP).mean(-2).swapaxes(0, 1)
    # Products in bfloat16, the default of TPUs, would shift the edge.
    mean = jnp.einsum("ryh,rhw,rxw->ryx", y, crops.astype(jnp.float32), x, precision="highest")
    return (mean >= 0.5).astype(jnp.float32)


def paste(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns a mask bool [height, width] of an image: probabilities [side, side] stretched over a box, from a half on.

    Bilinear at the centers of pixels, 0 outside the box, as in Detectron2; on the host, since images have all sizes.

    Args:
      mask: float32 [side, side].
      box: float [4], in pixels of that image.
      size: (height, width).
    """
    rows, columns = (_stretched(low, high, length, side)
                     for low, high, length, side in zip(box[1::-1], box[3:1:-1], size, mask.shape, strict=True))
    return rows @ mask @ columns.T >= 0.5


def _stretched(low: float, high: float, length: int, side: int) -> np.ndarray:
    """Returns the matrix [length, side] that interpolates cells, from low to high, at the centers of pixels."""
    place = (np.arange(length) + 0.5 - low) / max(high - low, MIN_SIDE) * side - 0.5
    return linear_weights(place, side)
