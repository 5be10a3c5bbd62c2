from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.ops import expert_linear


def operands(images=6, tokens=5, count=4, dtype=np.float32):
    draws = np.random.default_rng(0)
    shapes = (images, tokens, 3), (count, 3, 7), (count, 7), (images, tokens, 7)
    x, kernel, bias, dy = (jnp.asarray(draws.normal(size=shape), jnp.float32) for shape in shapes)
    return jnp.asarray(x, dtype), kernel, bias, jnp.asarray(dy, dtype), draws.integers(0, count - 1, images)  # one idle


def textbook(x, kernel, bias, expert):
    return jnp.stack([row @ kernel[e] + bias[e] for row, e in zip(x, expert, strict=True)])


@pytest.fixture(params=["cpu", "tpu", "default"])
def _way(request, monkeypatch):
    """What accelerators do gives the same numbers on a CPU, where it is only slower."""
    choose = jax.lax.platform_dependent
    monkeypatch.setattr(jax.lax, "platform_dependent",
                        lambda *x, **ways: choose(*x, default=ways[request.param]))
    monkeypatch.setattr(expert_linear, "ROWS_OF_A_TILE", 10)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("tokens", [1, 5])
def test_products_and_gradients_are_those_of_a_loop_over_images(tokens):
    x, kernel, bias, dy, expert = operands(tokens=tokens)
    y, backward = jax.vjp(partial(expert_linear.expert_linear, expert=jnp.asarray(expert)), x, kernel, bias)
    wanted, exact = jax.vjp(partial(textbook, expert=expert), x, kernel, bias)
    for ours, theirs in zip((y, *backward(dy)), (wanted, *exact(dy)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.all(np.asarray(backward(dy)[1])[3] == 0)  # nobody chose the last expert


@pytest.mark.parametrize("routing", [[0] * 7, [3] * 7, [3, 1, 3, 1, 0, 3, 3], [0, 1, 2, 3, 2, 1, 0]])
@pytest.mark.parametrize("rows", [1, 10, 15, 1000])
def test_every_image_has_a_place_in_a_tile_of_its_expert(routing, rows, monkeypatch):
    monkeypatch.setattr(expert_linear, "ROWS_OF_A_TILE", rows)
    expert = np.array(routing)
    slot, image, owner = (np.asarray(part) for part in expert_linear._tiles(jnp.asarray(expert), 4, 5))
    size = min(max(1, rows // 5), 7)
    assert len(owner) <= 7
    assert len(image) == len(owner) * size
    np.testing.assert_array_equal(image[slot], np.arange(7))
    np.testing.assert_array_equal(owner[slot // size], expert)
    assert np.all(np.delete(image, slot) == 7)  # the other places are empty
    assert np.all(np.diff(owner) >= 0)


@pytest.mark.usefixtures("_way")
def test_gradients_of_kernels_are_summed_in_their_own_dtype():
    x, kernel, bias, dy, expert = operands(dtype=jnp.bfloat16)
    y, backward = jax.vjp(partial(expert_linear.expert_linear, expert=jnp.asarray(expert)), x, kernel, bias)
    assert y.dtype == jnp.bfloat16
    dx, dkernel, dbias = backward(dy)
    assert (dx.dtype, dkernel.dtype, dbias.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    exact = jax.vjp(partial(textbook, expert=expert), *(np.float32(a) for a in (x, kernel, bias)))[1](np.float32(dy))
    np.testing.assert_allclose(dkernel, exact[1], atol=1e-5)
