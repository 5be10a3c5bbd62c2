from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.ops import attention as module


def textbook(q, k, v):
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5), v)


def attention(q, k, v, by="plain"):
    """The attention of [B, T, H, d] by one of the implementations; on a CPU that for TPUs is only slower."""
    images, tokens, heads, depth = q.shape
    flat = (x.reshape(images, tokens, heads * depth) for x in (q, k, v))
    return module._attention(*flat, heads, None, by).reshape(q.shape)


def operands(dtype=np.float32, scale=1.0, heads=3, depth=8):
    draws = np.random.default_rng(0).standard_normal((4, 2, 7, heads, depth), np.float32)
    return [jnp.asarray(scale * a, dtype) for a in draws]


on_any_device = pytest.mark.parametrize("by", ["plain", "tpu"])


@pytest.mark.parametrize(("heads", "depth"), [(3, 8), (4, 64)], ids=["heads apart", "two heads side by side"])
@on_any_device
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_attention_and_its_gradients_are_those_of_the_textbook(dtype, tolerance, heads, depth, by):
    *inputs, dout = operands(dtype, heads=heads, depth=depth)
    out, backward = jax.vjp(partial(attention, by=by), *inputs)
    with jax.enable_x64(True):
        truth, exact = jax.vjp(textbook, *(np.float64(np.float32(a)) for a in inputs))
        gradients = exact(np.float64(np.float32(dout)))
    for ours, expected in zip((out, *backward(dout)), (truth, *gradients), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.float32(ours), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@on_any_device
def test_large_scores_do_not_overflow(by):
    *inputs, dout = operands(scale=100)
    out, backward = jax.vjp(partial(attention, by=by), *inputs)
    np.testing.assert_allclose(out, textbook(*inputs), rtol=1e-4, atol=1e-4)
    assert all(np.isfinite(gradient).all() for gradient in backward(dout))


@pytest.mark.parametrize(("by", "products"), [("plain", 6), ("tpu", 8)])  # the scores on TPUs three times
def test_no_product_mixes_float32_with_bfloat16(by, products):
    *inputs, dout = operands(jnp.bfloat16)
    program = jax.make_jaxpr(lambda *a: jax.vjp(partial(attention, by=by), *a)[1](dout))(*inputs)
    found = [eqn for eqn in program.eqns if eqn.primitive.name == "dot_general"]
    assert len(found) == products
    assert all(var.aval.dtype == jnp.bfloat16 for eqn in found for var in eqn.invars)
