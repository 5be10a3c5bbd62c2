"""Boxes float32 [..., 4], (x1, y1, x2, y2) in pixels: overlap, the coder of the two stages, clipping.

Everything here is float32: bfloat16 cannot tell 1,000 from 1,003.
"""

import math

import jax
import jax.numpy as jnp

MAX_SCALE = math.log(1000 / 16)  # of a decoded width or height, as a logarithm (Detectron2's)
MIN_SIDE = 1e-3  # pixels; what sides are taken for at the least where they divide or their logarithm is taken


def sides(boxes: jax.Array) -> jax.Array:
    """Returns width and height, float32 [..., 2]; never below 0."""
    return jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)


def area(boxes: jax.Array) -> jax.Array:
    """Returns the area in square pixels, float32 [...]."""
    return sides(boxes).prod(-1)


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns intersection over union of each of a [..., N, 4] with each of b [..., M, 4], float32 [..., N, M].

    0 where both are empty.
    """
    a, b = a[..., :, None, :], b[..., None, :, :]
    corners = jnp.concatenate([jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])], -1)
    shared = area(corners)
    union = area(a) + area(b) - shared
    return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1), 0)


def generalized_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the generalized IoU (arXiv 1902.09630, algorithm 1) of a with b [..., 4], one by one: float32 [...]."""
    shared = area(jnp.concatenate([jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])], -1))
    around = area(jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], -1))
    union = area(a) + area(b) - shared

    def share(part: jax.Array, of: jax.Array) -> jax.Array:
        return jnp.where(of > 0, part / jnp.where(of > 0, of, 1), 0)

    return share(shared, union) - share(around - union, around)


def encode(boxes: jax.Array, proposals: jax.Array, weights: tuple[float, float, float, float]) -> jax.Array:
    """Returns what moves proposals [..., 4] onto boxes [..., 4]: (dx, dy, dw, dh), float32 (1506.01497, equation 2).

    Args:
      boxes, proposals: of the same shape; sides below MIN_SIDE count as that.
      weights: what the four are multiplied with.
    """
    size, origin = jnp.maximum(sides(proposals), MIN_SIDE), proposals[..., :2]
    target_size, target_origin = jnp.maximum(sides(boxes), MIN_SIDE), boxes[..., :2]
    shift = (target_origin + target_size / 2 - origin - size / 2) / size
    return jnp.concatenate([shift, jnp.log(target_size / size)], -1) * jnp.asarray(weights, jnp.float32)


def decode(deltas: jax.Array, proposals: jax.Array, weights: tuple[float, float, float, float]) -> jax.Array:
    """Returns proposals [..., 4] moved by deltas [..., 4]: the inverse of `encode`, whose scales end at MAX_SCALE."""
    deltas = deltas.astype(jnp.float32) / jnp.asarray(weights, jnp.float32)
    size = sides(proposals)
    center = proposals[..., :2] + size / 2 + deltas[..., :2] * size
    half = jnp.exp(jnp.minimum(deltas[..., 2:], MAX_SCALE)) * size / 2
    return jnp.concatenate([center - half, center + half], -1)


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Returns boxes [..., N, 4] cut to images of `size` [..., 2], (height, width) in pixels without padding."""
    limits = jnp.flip(size, -1).astype(boxes.dtype)[..., None, :]
    return jnp.clip(boxes, 0, jnp.concatenate([limits, limits], -1))
