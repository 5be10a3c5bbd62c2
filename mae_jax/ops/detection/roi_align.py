"""RoIAlign (arXiv 1703.06870, section 3) over a feature pyramid, with Detectron2's half-pixel offset (`aligned`).

There are two implementations. Bilinear interpolation is linear in rows and in columns, so it can be two matrix products
per map, which suits accelerators. For CPUs it is four reads per sample, with far fewer operations. Samples beyond a
map's outermost centers take the value of the edge; in a box that is clipped to the image, they are at most half a cell
beyond.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops import partitioning
from mae_jax.ops.detection.boxes import area, sides
from mae_jax.ops.resampling import linear_weights

MOST_SAMPLES = 16  # most samples per axis of an adaptive bin; enough for 448 pixels at stride 4 in 7 bins (our choice)
TOGETHER = 64  # boxes per chunk, which bounds memory (our choice)
CANONICAL = (224, 16)  # a box with this side in pixels belongs to the map of this stride (arXiv 1612.03144, equation 1)


def roi_align(pyramid: Sequence[jax.Array], strides: Sequence[int], boxes: jax.Array, side: int, samples: int = 0,
              canonical: tuple[float, int] = CANONICAL) -> jax.Array:
    """Returns the features of each box, [B, R, side, side, C], in the dtype of the maps.

    No gradient goes through the boxes.

    Args:
      pyramid: maps [B, rows, columns, C].
      strides: pixels per cell of each map, each twice the one before.
      boxes: float32 [B, R, 4] in pixels.
      side: bins per side.
      samples: equidistant samples per bin and axis; 0: as many as the bin has cells, as in Detectron2.
      canonical: (side of a box in pixels, stride of its map); a box with twice the side belongs to the next map.
    """
    boxes = jax.lax.stop_gradient(boxes)
    form = gathered if samples and partitioning.platform() == "cpu" else multiplied
    each = partial(form, strides=tuple(strides), side=side, samples=samples, canonical=canonical)
    return jax.vmap(each)(tuple(pyramid), boxes)


def level(boxes: jax.Array, strides: Sequence[int], canonical: tuple[float, int] = CANONICAL) -> jax.Array:
    """Returns the index of the map that each box [..., 4] belongs to, int32 [...]; arguments as in `roi_align`."""
    size, stride = canonical
    above = jnp.floor(jnp.log2(jnp.sqrt(area(boxes)) / size + 1e-8)).astype(jnp.int32)
    return jnp.clip(above + int(math.log2(stride / strides[0])), 0, len(strides) - 1)


def multiplied(pyramid: Sequence[jax.Array], boxes: jax.Array, strides: Sequence[int], side: int, samples: int,
               canonical: tuple[float, int]) -> jax.Array:
    """Returns the features [R, side, side, C] of one image by matrix products, in chunks of TOGETHER boxes."""
    @jax.checkpoint
    def some(boxes: jax.Array) -> jax.Array:
        own = level(boxes, strides, canonical)
        found = jnp.zeros((), jnp.float32)
        for number, (maps, stride) in enumerate(zip(pyramid, strides, strict=True)):
            positions, weights = _samples(boxes / stride - 0.5, side, samples)
            x, y = (_interpolation(positions[..., axis, :, :], weights[..., axis, :, :], length)
                    for axis, length in enumerate(maps.shape[1::-1]))
            y = jnp.where((own == number)[:, None, None], y, 0).astype(maps.dtype)
            tall = jnp.einsum("rph,hwc->rpwc", y, maps)
            found += jnp.einsum("rqw,rpwc->rpqc", x.astype(maps.dtype), tall, preferred_element_type=jnp.float32)
        return found.astype(pyramid[0].dtype)

    count = len(boxes)
    chunk = min(TOGETHER, count)
    padded = jnp.pad(boxes, ((0, -count % chunk), (0, 0)))
    found = jax.lax.map(some, padded.reshape(-1, chunk, 4))
    return found.reshape(-1, *found.shape[2:])[:count]


def gathered(pyramid: Sequence[jax.Array], boxes: jax.Array, strides: Sequence[int], side: int, samples: int,
             canonical: tuple[float, int]) -> jax.Array:
    """Returns the same as `multiplied` by reading four cells per sample; `samples` must not be 0."""
    own = level(boxes, strides, canonical)
    shapes = np.array([maps.shape[:2] for maps in pyramid])
    starts = np.concatenate([[0], np.cumsum(shapes.prod(1))[:-1]])
    cells = jnp.concatenate([maps.reshape(-1, maps.shape[-1]) for maps in pyramid])
    stride, begin = jnp.asarray(strides, jnp.float32)[own], jnp.asarray(starts)[own]
    lengths = jnp.asarray(shapes[:, ::-1])[own]  # columns, rows
    positions, _ = _samples(boxes / stride[:, None] - 0.5, side, samples)
    positions = jnp.clip(positions, 0, lengths[:, :, None, None] - 1).reshape(*lengths.shape, -1)
    low = jnp.floor(positions).astype(jnp.int32)
    part = positions - low
    corners = jnp.stack([low, jnp.minimum(low + 1, lengths[..., None] - 1)], -1)
    parts = jnp.stack([1 - part, part], -1)  # [R, 2, side · samples, 2]
    (columns, rows), (x, y) = (tuple(a.reshape(len(boxes), 2, -1).swapaxes(0, 1)) for a in (corners, parts))
    index = begin[:, None, None] + rows[:, :, None] * lengths[:, :1, None] + columns[:, None]
    values = cells[index].reshape(len(boxes), side, 2 * samples, side, 2 * samples, -1)
    weights = (y / samples).reshape(-1, side, 2 * samples), (x / samples).reshape(-1, side, 2 * samples)
    found = jnp.einsum("rpsqtc,rps,rqt->rpqc", values, *weights, preferred_element_type=jnp.float32)
    return found.astype(pyramid[0].dtype)


def _samples(boxes: jax.Array, side: int, samples: int) -> tuple[jax.Array, jax.Array]:
    """Returns positions and weights of the samples of boxes [R, 4] in cells, float32 [R, 2 (x, y), side, samples].

    With `samples` 0 a bin has one sample per cell, rounded up, and at most MOST_SAMPLES; unused samples have weight 0.
    """
    step = sides(boxes)[:, :, None, None] / side
    taken = jnp.clip(jnp.ceil(step), 1, MOST_SAMPLES) if not samples else jnp.full_like(step, samples)
    number = jnp.arange(samples or MOST_SAMPLES)
    place = jnp.arange(side)[:, None] + (number + 0.5) / taken
    weights = jnp.where(number < taken, 1 / taken, 0)
    return boxes[:, :2, None, None] + place * step, jnp.broadcast_to(weights, place.shape)


def _interpolation(positions: jax.Array, weights: jax.Array, length: int) -> jax.Array:
    """Returns matrices [R, side, length] of linear interpolations at positions [R, side, samples], summed by weight."""
    return (linear_weights(jnp.clip(positions, 0, length - 1), length) * weights[..., None]).sum(-2)
