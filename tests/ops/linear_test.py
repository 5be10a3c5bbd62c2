import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mae_jax.ops.linear import gelu, linear, linears


def operands(dtype):
    rng = np.random.default_rng(0)
    x, kernel, bias, dy = (rng.standard_normal(shape, np.float32) for shape in ((3, 70, 8), (8, 5), (5,), (3, 70, 5)))
    return jnp.asarray(x, dtype), jnp.asarray(kernel), jnp.asarray(bias), jnp.asarray(dy, dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_the_linear_layer_and_its_gradients_are_those_of_a_plain_product(dtype, tolerance):
    x, kernel, bias, dy = operands(dtype)
    y, backward = jax.vjp(linear, x, kernel, bias)
    wide = np.float32(x), np.float32(kernel), np.float32(bias)
    expected, plain = jax.vjp(lambda x, kernel, bias: x @ kernel + bias, *wide)
    assert y.dtype == dtype
    np.testing.assert_allclose(np.float32(y), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    for ours, truth, primal in zip(backward(dy), plain(np.float32(dy)), (x, kernel, bias), strict=True):
        assert ours.dtype == primal.dtype
        np.testing.assert_allclose(np.float32(ours), truth, rtol=tolerance, atol=tolerance * np.abs(truth).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_several_linear_layers_of_one_kernel_are_those_one_by_one(dtype, tolerance):
    rng = np.random.default_rng(0)
    x, kernel, bias = (jnp.float32(rng.normal(size=shape)) for shape in ((3, 7, 8), (8, 3, 5), (3, 5)))
    dys = tuple(jnp.asarray(rng.normal(size=(3, 7, 5)), dtype) for _ in range(3))
    x = x.astype(dtype)
    ours, backward = jax.vjp(linears, x, kernel, bias)
    theirs, one_by_one = jax.vjp(lambda x, k, b: tuple(linear(x, k[:, n], b[n]) for n in range(3)), x, kernel, bias)
    for part, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(part, other)
    for found, wanted in zip(backward(dys), one_by_one(dys), strict=True):
        assert found.dtype == wanted.dtype
        limit = tolerance * np.abs(np.float32(wanted)).max()
        np.testing.assert_allclose(np.float32(found), np.float32(wanted), rtol=0, atol=limit)


def test_weight_gradients_of_bfloat16_activations_are_not_rounded_to_bfloat16():
    x, kernel, bias, dy = operands(jnp.bfloat16)
    _, dkernel, dbias = jax.vjp(linear, x, kernel, bias)[1](dy)
    rows, drows = (np.float64(np.float32(a)).reshape(210, -1) for a in (x, dy))
    np.testing.assert_allclose(dkernel, rows.T @ drows, rtol=0, atol=1e-5 * np.abs(rows.T @ drows).max())
    np.testing.assert_allclose(dbias, drows.sum(0), rtol=0, atol=1e-5 * np.abs(drows.sum(0)).max())


def test_gelu_is_exact_to_float32_and_its_gradient_too():
    x = np.linspace(-8, 8, 4001)
    cdf, density = 0.5 * scipy.special.erfc(-x / np.sqrt(2)), np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)
    y, backward = jax.vjp(gelu, jnp.float32(x))
    np.testing.assert_allclose(y, x * cdf, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(backward(jnp.ones_like(y))[0], cdf + x * density, rtol=1e-6, atol=1e-6)


def test_gelu_keeps_bfloat16_and_computes_in_float32():
    x = jnp.linspace(-4, 4, 401, dtype=jnp.bfloat16)
    y, backward = jax.vjp(gelu, x)
    assert y.dtype == backward(y)[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, gelu(jnp.float32(x)).astype(jnp.bfloat16))
