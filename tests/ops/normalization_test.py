import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.ops import normalization
from tests.helpers.gpu import pretend


def operands(dtype, mean=0.0):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 3, 7, 24))
    scale, bias = rng.normal(size=(2, 24))
    return jnp.asarray(x + mean, dtype), jnp.float32(scale), jnp.float32(bias), jnp.asarray(dy, dtype)


@pytest.fixture
def _on_a_gpu(monkeypatch):
    """What GPUs compute, on a CPU."""
    pretend(monkeypatch)


def textbook(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.usefixtures("_on_a_gpu")
def test_layer_norm_and_its_written_gradient_are_those_of_the_textbook(dtype, tolerance, mean):
    *inputs, dy = operands(dtype, mean)
    y, backward = jax.vjp(lambda *a: normalization.layer_norm(*a, dtype), *inputs)
    with jax.enable_x64(True):
        truth, exact = jax.vjp(textbook, *(np.float64(np.float32(a)) for a in inputs))
        gradients = exact(np.float64(np.float32(dy)))
    for ours, expected, like in zip((y, *backward(dy)), (truth, *gradients), (dy, *inputs), strict=True):
        assert ours.dtype == like.dtype
        np.testing.assert_allclose(np.float32(ours), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.usefixtures("_on_a_gpu")
def test_vectors_of_one_value_have_finite_gradients():
    _, scale, bias, dy = operands(jnp.float32)
    x = jnp.full(dy.shape, 1234.5)
    _, backward = jax.vjp(lambda *a: normalization.layer_norm(*a, jnp.float32), x, scale, bias)
    assert all(np.isfinite(gradient).all() for gradient in backward(dy))


def test_elsewhere_the_gradient_is_autodiffs():
    *inputs, _ = operands(jnp.float32)
    program = jax.make_jaxpr(lambda *a: normalization.layer_norm(*a, jnp.float32))(*inputs)
    assert "custom_vjp" not in str(program)
