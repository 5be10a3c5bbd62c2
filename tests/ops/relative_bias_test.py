"""Biases of displacements between patches, by a look-up, and attention with them, by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops import attention, relative_bias


def looked_up(table, grid):
    """Returns biases [H, 1 + N, 1 + N] by BEiT's numbering."""
    places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    out = np.empty((len(places) + 1, len(places) + 1, table.shape[1]))
    out[0], out[1:, 0], out[0, 0] = table[-3], table[-2], table[-1]
    for q, (y, x) in enumerate(places, 1):
        for k, (other_y, other_x) in enumerate(places, 1):
            out[q, k] = table[(y - other_y + grid[0] - 1) * (2 * grid[1] - 1) + x - other_x + grid[1] - 1]
    return out.transpose(2, 0, 1)


def test_each_pair_of_tokens_has_the_bias_of_its_displacement():
    grid = 3, 5
    table = np.random.default_rng(0).normal(size=(relative_bias.entries(grid), 2)).astype(np.float32)
    np.testing.assert_allclose(relative_bias.biases(jnp.asarray(table), grid), looked_up(table, grid), atol=1e-6)


def test_attention_and_its_gradients_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    q, k, v, dout = rng.normal(size=(4, 2, 7, 6)).astype(np.float32)
    bias = rng.normal(size=(3, 7, 7)).astype(np.float32)

    def formula(q, k, v, bias):
        q, k, v = (x.reshape(2, 7, 3, 2) for x in (q, k, v))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(2) + bias, -1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, 7, 6)

    wanted, pull = jax.vjp(formula, q, k, v, bias)
    found, own_pull = jax.vjp(lambda *args: relative_bias.attention(*args, 3), q, k, v, bias)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for ours, theirs in zip(own_pull(dout), pull(dout), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_without_biases_it_is_plain_attention():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 7, 6)).astype(np.float32)
    found = relative_bias.attention(q, k, v, jnp.zeros((3, 7, 7)), 3)
    np.testing.assert_allclose(found, attention.attention(q, k, v, 3), atol=1e-6)
