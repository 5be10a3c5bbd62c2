"""Convolutions over maps [B, rows, columns, C], with kernel gradients that are summed in float32."""

import jax
import jax.numpy as jnp

from mae_jax.ops import partitioning
from mae_jax.ops.linear import linear

MAPS = ("NHWC", "HWIO", "NHWC")


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x [B, H, W, C] convolved with a kernel [k, k, C, F], k odd, as [B, H, W, F] in the dtype of x.

    The map is padded with zeros. As in `linear`, the gradient of the kernel is summed and returned in the kernel's
    dtype.
    """
    return _forward(x, kernel)[0]


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    whole = partitioning.gather(kernel.astype(x.dtype), "")
    return _product(x, whole), (x, whole, kernel)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=MAPS)


def _backward(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, whole, kernel = saved
    dx = _product(dy, whole[::-1, ::-1].swapaxes(2, 3))
    around = [(side // 2, side // 2) for side in kernel.shape[:2]]
    # The sum is over images, which take the role of channels; dy takes the role of the kernel.
    dkernel = jax.lax.conv_general_dilated(x, dy, (1, 1), around, dimension_numbers=("CHWN", "IHWO", "HWNC"),
                                           preferred_element_type=kernel.dtype)
    return dx, dkernel


convolve.defvjp(_forward, _backward)


def depth_to_space(x: jax.Array) -> jax.Array:
    """Returns [B, 2 H, 2 W, F] for x [B, H, W, 2, 2, F]: each cell becomes 2 x 2 cells (row, column)."""
    images, rows, columns, _, _, width = x.shape
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(images, 2 * rows, 2 * columns, width)


def transposed(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns the transposed convolution of stride 2 of x [B, h, w, C] with kernel [C, 2, 2, F]: [B, 2 h, 2 w, F].

    The windows do not overlap, so it is a linear layer from each cell to four:
    out[2 i + a, 2 j + b] = x[i, j] · kernel[:, a, b] + bias, for bias [F].
    """
    return depth_to_space(linear(x, kernel, jnp.broadcast_to(bias, kernel.shape[1:])))


def greatest(x: jax.Array, side: int = 2) -> jax.Array:
    """Max-pools a map [B, H, W, C] over squares of `side` cells: [B, H // side, W // side, C].

    Among equal values the first gets the gradient, as in torch. The gradient of `x.max` is shared by all values that
    equal the maximum. If rematerialization recomputes x with other rounding, no value does, and the gradient is 0 / 0.
    """
    window = (1, side, side, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")


def double(x: jax.Array) -> jax.Array:
    """Returns a map [B, H, W, C] with each cell repeated 2 x 2 times, [B, 2 H, 2 W, C]."""
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
