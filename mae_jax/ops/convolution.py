"""Convolutions with gradients that keep float32 sums, and transposed ones as dense layers."""

import jax
import jax.numpy as jnp

from mae_jax.ops import partitioning
from mae_jax.ops.linear import linear

FORWARD = ("NHWC", "HWIO", "NHWC")
KERNEL_GRADIENT = ("CHWN", "IHWO", "HWNC")  # images are summed over, as channels are forward


@jax.custom_vjp
def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the convolution of x [B, h, w, C] with kernel [k, k, C, F], k odd, zeros around: [B, h, w, F], as x.

    What deep learning calls so: the kernel is not flipped. As `linear`, the gradient of the kernel is summed, and
    leaves, in the dtype of the kernel whatever that of x.
    """
    return _forward(x, kernel)[0]


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    whole = partitioning.gather(kernel.astype(x.dtype), "")
    out = jax.lax.conv_general_dilated(x, whole, (1, 1), _around(kernel), dimension_numbers=FORWARD)
    return out, (x, whole, kernel)


def _backward(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
    x, whole, kernel = saved
    turned = whole[::-1, ::-1].swapaxes(2, 3)
    dx = jax.lax.conv_general_dilated(dy, turned, (1, 1), _around(kernel), dimension_numbers=FORWARD)
    dkernel = jax.lax.conv_general_dilated(x, dy, (1, 1), _around(kernel), dimension_numbers=KERNEL_GRADIENT,
                                           preferred_element_type=kernel.dtype)
    return dx, dkernel


conv.defvjp(_forward, _backward)


def _around(kernel: jax.Array) -> list[tuple[int, int]]:
    """Returns how many zeros lie before and behind rows and columns."""
    return [(size // 2, size // 2) for size in kernel.shape[:2]]


def double(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns the transposed convolution of stride 2 of x [B, h, w, C] with kernel [C, 2, 2, F]: [B, 2 h, 2 w, F].

    Its windows do not overlap, so it is a dense layer to four cells each:
    out[2 i + a, 2 j + b] = x[i, j] · kernel[:, a, b] + bias [F].
    """
    cells = linear(x, kernel, jnp.broadcast_to(bias, kernel.shape[1:]))
    images, rows, columns, *_, features = cells.shape
    return cells.swapaxes(2, 3).reshape(images, 2 * rows, 2 * columns, features)


def max_pool(x: jax.Array, side: int) -> jax.Array:
    """Returns the maxima of x [B, h, w, C] over squares of `side` cells: [B, h // side, w // side, C]."""
    images, rows, columns, channels = x.shape
    rows, columns = rows // side, columns // side
    squares = x[:, :rows * side, :columns * side].reshape(images, rows, side, columns, side, channels)
    return squares.max((2, 4))
