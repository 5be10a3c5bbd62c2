import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.ops import normalization, normalization_gpu
from tests.helpers.gpu import pretend


def operands(dtype, mean=0.0):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 3, 7, 24))
    scale, bias = rng.normal(size=(2, 24))
    return jnp.asarray(x + mean, dtype), jnp.float32(scale), jnp.float32(bias), jnp.asarray(dy, dtype)


@pytest.fixture
def _on_a_gpu(monkeypatch):
    """What GPUs compute, on a CPU; a program has several tiles of two vectors."""
    pretend(monkeypatch)
    monkeypatch.setattr(normalization_gpu, "TILE", 64)


def textbook(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.usefixtures("_on_a_gpu")
def test_layer_norm_and_the_gradient_of_its_kernel_are_those_of_the_textbook(dtype, tolerance, mean):
    *inputs, dy = operands(dtype, mean)
    y, backward = jax.vjp(lambda *a: normalization.layer_norm(*a, dtype), *inputs)
    with jax.enable_x64(True):
        truth, exact = jax.vjp(textbook, *(np.float64(np.float32(a)) for a in inputs))
        gradients = exact(np.float64(np.float32(dy)))
    for ours, expected, like in zip((y, *backward(dy)), (truth, *gradients), (dy, *inputs), strict=True):
        assert ours.dtype == like.dtype
        np.testing.assert_allclose(np.float32(ours), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.usefixtures("_on_a_gpu")
def test_the_residual_and_its_last_bias_have_the_gradients_of_the_textbook(dtype, tolerance):
    x, scale, bias, dy = operands(dtype)
    added, dx = scale[::-1], dy[:, ::-1]

    def ours(x, scale, bias, added):
        x, y = normalization.residual_norm(x, scale, bias, dtype, added)
        return x + jax.lax.stop_gradient(added).astype(dtype), y

    (out, y), backward = jax.vjp(ours, x, scale, bias, added)
    with jax.enable_x64(True):
        wide = [np.float64(np.float32(a)) for a in (x, scale, bias, added)]
        truth, exact = jax.vjp(lambda x, scale, bias, added: (x + added, textbook(x, scale, bias)), *wide)
        gradients = exact((np.float64(np.float32(dx)), np.float64(np.float32(dy))))
    found, like = (out, y, *backward((dx, dy))), (x, dy, x, scale, bias, added)
    for part, expected, other in zip(found, (*truth, *gradients), like, strict=True):
        assert part.dtype == other.dtype
        np.testing.assert_allclose(np.float32(part), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.usefixtures("_on_a_gpu")
def test_vectors_of_one_value_have_finite_gradients():
    _, scale, bias, dy = operands(jnp.float32)
    x = jnp.full(dy.shape, 1234.5)
    _, backward = jax.vjp(lambda *a: normalization.layer_norm(*a, jnp.float32), x, scale, bias)
    assert all(np.isfinite(gradient).all() for gradient in backward(dy))


def test_elsewhere_the_gradient_is_autodiffs():
    *inputs, _ = operands(jnp.float32)
    for norm in (normalization.layer_norm, normalization.residual_norm):
        program = jax.make_jaxpr(lambda *a, norm=norm: norm(*a, jnp.float32))(*inputs)
        assert "custom_vjp" not in str(program)


def test_a_gradient_that_no_kernel_takes_is_not_lost():
    x, scale, bias, _ = operands(jnp.float32)
    with pytest.raises(ValueError, match="added"):
        normalization.residual_norm(x, scale, bias, jnp.float32, scale)
