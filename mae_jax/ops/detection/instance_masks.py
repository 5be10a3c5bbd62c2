"""Instance masks: training targets of a mask head, and pasting of predicted masks into an image."""

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops.detection.boxes import MIN_SIDE, sides
from mae_jax.ops.detection.crops import CROP
from mae_jax.ops.resampling import linear_weights

SAMPLES = 4  # per side of a target's cell; for targets of 28 cells, the cells of a crop if proposal and object coincide


def unpack(packed: jax.Array) -> jax.Array:
    """Inverts `crops.pack` on the device: uint8 [..., PACKED] → bool [..., CROP, CROP]."""
    bits = (packed[..., None] >> jnp.arange(7, -1, -1, jnp.uint8)) & 1
    return bits.reshape(*packed.shape[:-1], CROP, CROP).astype(bool)


def targets(crops: jax.Array, objects: jax.Array, proposals: jax.Array, side: int) -> jax.Array:
    """Returns the targets of the mask head, float32 [R, side, side] of 0 and 1 (arXiv 1703.06870, section 3.1).

    A target is the object's mask within the proposal: RoIAlign of the crop, with 0 outside, and a threshold of 1/2.

    Args:
      crops: of the objects' masks, bool [R, CROP, CROP].
      objects: boxes of the crops, float32 [R, 4].
      proposals: float32 [R, 4].
      side: cells per side of a target.
    """
    size = jnp.maximum(sides(objects), MIN_SIDE)
    scale = CROP / size
    begin = (proposals[:, :2] - objects[:, :2]) * scale
    step = sides(proposals) * scale / (side * SAMPLES)
    place = begin[..., None] + (jnp.arange(side * SAMPLES) + 0.5) * step[..., None] - 0.5  # [R, 2 (x, y), ...]
    x, y = linear_weights(place, CROP).reshape(*place.shape[:2], side, SAMPLES, CROP).mean(-2).swapaxes(0, 1)
    # Products in bfloat16, the default of TPUs, would move the mask's edge.
    mean = jnp.einsum("ryh,rhw,rxw->ryx", y, crops.astype(jnp.float32), x, precision="highest")
    return (mean >= 0.5).astype(jnp.float32)


def paste(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a predicted mask to its box, and returns the mask of the image with a threshold of 1/2.

    Interpolation is bilinear at the centers of pixels, with 0 outside the box, as in Detectron2. It runs on the host,
    since every image has its own size.

    Args:
      mask: probabilities float32 [side, side].
      box: float [4], in pixels of the image.
      size: (height, width) of the image.

    Returns:
      bool [height, width].
    """
    rows, columns = (_stretched(low, high, length, side)
                     for low, high, length, side in zip(box[1::-1], box[3:1:-1], size, mask.shape, strict=True))
    return rows @ mask @ columns.T >= 0.5


def _stretched(low: float, high: float, length: int, side: int) -> np.ndarray:
    """Returns the matrix [length, side] that interpolates `side` cells between low and high at pixel centers."""
    place = (np.arange(length) + 0.5 - low) / max(high - low, MIN_SIDE) * side - 0.5
    return linear_weights(place, side)
