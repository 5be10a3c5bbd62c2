"""Convolutions and their gradients, against plain loops, and the dtype that gradients of kernels are summed in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.ops import convolution


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_loops(x, kernel):
    side = kernel.shape[0]
    padded = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    rows, columns = x.shape[1:3]
    return sum(padded[:, i:i + rows, j:j + columns] @ kernel[i, j] for i in range(side) for j in range(side))


@pytest.mark.parametrize("side", [1, 3, 5])
def test_convolution_and_gradients_are_those_of_shifted_products(side):
    x, kernel, dy = normal(0, 2, 5, 4, 3), normal(1, side, side, 3, 6), normal(2, 2, 5, 4, 6)
    out, pull = jax.vjp(convolution.convolve, x, kernel)
    np.testing.assert_allclose(out, by_loops(x, kernel), atol=1e-4)
    dx, dkernel = pull(dy)
    padded = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    wanted = [[np.einsum("byxc,byxf->cf", padded[:, i:i + 5, j:j + 4], dy) for j in range(side)] for i in range(side)]
    np.testing.assert_allclose(dkernel, wanted, atol=1e-4)
    np.testing.assert_allclose(dx, by_loops(dy, kernel[::-1, ::-1].swapaxes(2, 3)), atol=1e-4)


def test_a_kernels_gradient_is_summed_in_float32_of_maps_in_bfloat16():
    x = jnp.ones((1, 64, 64, 1), jnp.bfloat16)
    kernel = jnp.ones((1, 1, 1, 1), jnp.float32)
    out, pull = jax.vjp(convolution.convolve, x, kernel)
    assert out.dtype == jnp.bfloat16
    dx, dkernel = pull(jnp.where(jnp.arange(4096).reshape(out.shape) == 0, jnp.bfloat16(512), jnp.bfloat16(1)))
    assert (dx.dtype, dkernel.dtype, float(dkernel[0, 0, 0, 0])) == (jnp.bfloat16, jnp.float32, 4095 + 512)
