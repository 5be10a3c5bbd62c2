import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.ops import attention as module


def textbook(q, k, v):
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5), v)


def attention(q, k, v):
    images, tokens, heads, depth = q.shape
    return module.attention(*(x.reshape(images, tokens, heads * depth) for x in (q, k, v)), heads).reshape(q.shape)


def operands(dtype=np.float32, scale=1.0, heads=3, depth=8):
    draws = np.random.default_rng(0).standard_normal((4, 2, 7, heads, depth), np.float32)
    return [jnp.asarray(scale * a, dtype) for a in draws]


@pytest.fixture(params=["any platform", "TPU"])
def _platform(request, monkeypatch):
    """What TPUs compute gives the same numbers on a CPU, where it is only slower."""
    if request.param == "TPU":
        monkeypatch.setattr(module, "_forward_anywhere", lambda heads, *x, kept: module._forward_on_tpu(heads, *x))
        monkeypatch.setattr(module, "_backward_anywhere", module._backward_on_tpu)


@pytest.mark.parametrize(("heads", "depth"), [(3, 8), (4, 64)], ids=["heads apart", "two heads side by side"])
@pytest.mark.usefixtures("_platform")
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_attention_and_its_gradients_are_those_of_the_textbook(dtype, tolerance, heads, depth):
    *inputs, dout = operands(dtype, heads=heads, depth=depth)
    out, backward = jax.vjp(attention, *inputs)
    with jax.enable_x64(True):
        truth, exact = jax.vjp(textbook, *(np.float64(np.float32(a)) for a in inputs))
        gradients = exact(np.float64(np.float32(dout)))
    for ours, expected in zip((out, *backward(dout)), (truth, *gradients), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.float32(ours), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.usefixtures("_platform")
def test_large_scores_do_not_overflow():
    *inputs, dout = operands(scale=100)
    out, backward = jax.vjp(attention, *inputs)
    np.testing.assert_allclose(out, textbook(*inputs), rtol=1e-4, atol=1e-4)
    assert all(np.isfinite(gradient).all() for gradient in backward(dout))


def test_no_product_mixes_float32_with_bfloat16():
    *inputs, dout = operands(jnp.bfloat16)
    program = jax.make_jaxpr(lambda *a: jax.vjp(attention, *a)[1](dout))(*inputs)
    found = list(products(program.jaxpr))
    assert len(found) == 2 * 6 + 2  # the scores on TPUs three times
    assert all(var.aval.dtype == jnp.bfloat16 for eqn in found for var in eqn.invars)


def products(program):
    for eqn in program.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for branch in eqn.params.get("branches", ()):
            yield from products(branch.jaxpr)
