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
    out, pull = jax.vjp(convolution.conv, x, kernel)
    np.testing.assert_allclose(out, by_loops(x, kernel), atol=1e-4)
    dx, dkernel = pull(dy)
    padded = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    wanted = [[np.einsum("byxc,byxf->cf", padded[:, i:i + 5, j:j + 4], dy) for j in range(side)] for i in range(side)]
    np.testing.assert_allclose(dkernel, wanted, atol=1e-4)
    np.testing.assert_allclose(dx, by_loops(dy, kernel[::-1, ::-1].swapaxes(2, 3)), atol=1e-4)


def test_a_kernels_gradient_is_summed_in_float32_of_maps_in_bfloat16():
    x = jnp.ones((1, 64, 64, 1), jnp.bfloat16)
    kernel = jnp.ones((1, 1, 1, 1), jnp.float32)
    out, pull = jax.vjp(convolution.conv, x, kernel)
    assert out.dtype == jnp.bfloat16
    dx, dkernel = pull(jnp.where(jnp.arange(4096).reshape(out.shape) == 0, jnp.bfloat16(512), jnp.bfloat16(1)))
    assert (dx.dtype, dkernel.dtype, float(dkernel[0, 0, 0, 0])) == (jnp.bfloat16, jnp.float32, 4095 + 512)


def test_doubling_lays_four_cells_for_each_and_its_gradient_gathers_them():
    x, kernel, bias = normal(0, 2, 3, 4, 5), normal(1, 5, 2, 2, 6), normal(2, 6)
    out, pull = jax.vjp(convolution.double, x, kernel, bias)
    for a in range(2):
        for b in range(2):
            np.testing.assert_allclose(out[:, a::2, b::2], x @ kernel[:, a, b] + bias, atol=1e-5)
    dy = normal(3, *out.shape)
    dx, dkernel, dbias = pull(dy)
    np.testing.assert_allclose(dbias, dy.sum((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(dx, sum(dy[:, a::2, b::2] @ kernel[:, a, b].T for a in range(2) for b in range(2)),
                               atol=1e-4)
    np.testing.assert_allclose(dkernel[:, 1, 0], np.einsum("byxc,byxf->cf", x, dy[:, 1::2, ::2]), atol=1e-4)


@pytest.mark.parametrize("side", [2, 4])
def test_pooling_takes_the_largest_of_each_whole_square(side):
    x = normal(0, 2, 9, 8, 3)
    found = np.asarray(convolution.max_pool(jnp.asarray(x), side))
    assert found.shape == (2, 9 // side, 8 // side, 3)
    for i, j in np.ndindex(found.shape[1:3]):
        square = x[:, i * side:(i + 1) * side, j * side:(j + 1) * side]
        np.testing.assert_array_equal(found[:, i, j], square.max((1, 2)))
