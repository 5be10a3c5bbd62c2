"""Boxes float32 [..., 4], (x1, y1, x2, y2) in pixels: IoU, encoding as deltas, clipping.

All computations are float32: bfloat16 cannot tell 1,000 from 1,003.
"""

import math

import jax
import jax.numpy as jnp

MAX_SCALE = math.log(1000 / 16)  # largest log of the factor by which `decode` enlarges a side (Detectron2's)
MIN_SIDE = 1e-3  # pixels; lower bound of sides that divide or are inside a logarithm


def sides(boxes: jax.Array) -> jax.Array:
    """Returns width and height of boxes [..., 4], at least 0, float32 [..., 2]."""
    return jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)


def area(boxes: jax.Array) -> jax.Array:
    """Returns the area of boxes [..., 4] in square pixels, float32 [...]."""
    return sides(boxes).prod(-1)


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the IoU of each box of a [..., N, 4] with each box of b [..., M, 4], float32 [..., N, M].

    The IoU of two empty boxes is 0.
    """
    a, b = a[..., :, None, :], b[..., None, :, :]
    corners = jnp.concatenate([jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])], -1)
    shared = area(corners)
    union = area(a) + area(b) - shared
    return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1), 0)


def generalized_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the elementwise generalized IoU (arXiv 1902.09630, algorithm 1) of a and b [..., 4], float32 [...]."""
    shared = area(jnp.concatenate([jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])], -1))
    around = area(jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], -1))
    union = area(a) + area(b) - shared

    def share(part: jax.Array, of: jax.Array) -> jax.Array:
        return jnp.where(of > 0, part / jnp.where(of > 0, of, 1), 0)

    return share(shared, union) - share(around - union, around)


def encode(boxes: jax.Array, proposals: jax.Array, weights: tuple[float, float, float, float]) -> jax.Array:
    """Returns the deltas (dx, dy, dw, dh) from proposals to boxes, float32 [..., 4] (arXiv 1506.01497, equation 2).

    Args:
      boxes, proposals: [..., 4]; sides below MIN_SIDE are set to it.
      weights: factors of the four deltas.
    """
    size, origin = jnp.maximum(sides(proposals), MIN_SIDE), proposals[..., :2]
    target_size, target_origin = jnp.maximum(sides(boxes), MIN_SIDE), boxes[..., :2]
    shift = (target_origin + target_size / 2 - origin - size / 2) / size
    return jnp.concatenate([shift, jnp.log(target_size / size)], -1) * jnp.asarray(weights, jnp.float32)


def decode(deltas: jax.Array, proposals: jax.Array, weights: tuple[float, float, float, float]) -> jax.Array:
    """Applies deltas [..., 4] to proposals [..., 4], the inverse of `encode`; dw and dh are clipped at MAX_SCALE."""
    deltas = deltas.astype(jnp.float32) / jnp.asarray(weights, jnp.float32)
    size = sides(proposals)
    center = proposals[..., :2] + size / 2 + deltas[..., :2] * size
    half = jnp.exp(jnp.minimum(deltas[..., 2:], MAX_SCALE)) * size / 2
    return jnp.concatenate([center - half, center + half], -1)


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Clips boxes [..., N, 4] to images of `size` [..., 2], (height, width) in pixels without padding."""
    limits = jnp.flip(size, -1).astype(boxes.dtype)[..., None, :]
    return jnp.clip(boxes, 0, jnp.concatenate([limits, limits], -1))
