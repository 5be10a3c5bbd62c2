"""Attention with a learned bias for each displacement between two patches (BEiT, arXiv 2106.08254)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def entries(grid: tuple[int, int]) -> int:
    """Returns the number of biases per head: one for each displacement in the grid, and three for the class token."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def biases(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Returns the biases float32 [H, 1 + N, 1 + N] (queries, keys) of a class token and the patches of a grid.

    Args:
      table: float32 [entries, H] in BEiT's order: by the displacement query - key in rows, then in columns, both
        ascending; then three entries for the class token as query, as key, and as both.
      grid: patches along (height, width).
    """
    (rows, columns), heads = grid, table.shape[1]
    away = table[:-3].reshape(2 * rows - 1, 2 * columns - 1, heads)
    # Products with one-hot rows: the gradient of a look-up would be a scatter.
    of_rows = jnp.einsum("qkr,rch->qkch", _one_hot(rows), away, precision="highest")
    patches = jnp.einsum("xyc,qkch->hqxky", _one_hot(columns), of_rows, precision="highest")
    patches = patches.reshape(heads, rows * columns, rows * columns)
    query, key, both = (table[row][:, None, None] for row in (-3, -2, -1))
    first = jnp.concatenate([both, jnp.broadcast_to(query, (heads, 1, rows * columns))], 2)
    return jnp.concatenate([first, jnp.concatenate([jnp.broadcast_to(key, (heads, rows * columns, 1)), patches], 2)], 1)


def _one_hot(side: int) -> np.ndarray:
    """Returns the one-hot displacements query - key along one side, float32 [queries, keys, displacements]."""
    places = np.arange(side)
    away = places[:, None] - places + side - 1
    return (away[..., None] == np.arange(2 * side - 1)).astype(np.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, heads: int) -> jax.Array:
    """Returns softmax(q kᵀ / √d + bias) v, [B, T, D], for q, k and v [B, T, D] and bias float32 [H, T, T].

    The softmax is float32, and so is the gradient of the bias, a sum over the images.
    """
    return _forward(q, k, v, bias, heads)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, heads: int
             ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    apart = [_apart(x, heads) for x in (q, k, v)]
    scores = jnp.einsum("bqhd,bkhd->bhqk", *apart[:2], preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * apart[0].shape[-1] ** -0.5 + bias, -1).astype(q.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, apart[2], preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(q.shape), (q, k, v, weights)


def _backward(heads: int, saved: tuple[Any, ...], dout: jax.Array) -> tuple[jax.Array, ...]:
    *given, weights = saved
    q, k, v, dout = (_apart(x, heads) for x in (*given, dout))
    scale = q.shape[-1] ** -0.5
    dv = jnp.einsum("bhqk,bqhd->bkhd", weights, dout)
    dweights = jnp.einsum("bqhd,bkhd->bhqk", dout, v, preferred_element_type=jnp.float32)
    wide = weights.astype(jnp.float32)
    dscores = wide * (dweights - (dweights * wide).sum(-1, keepdims=True))
    dbias, dscores = dscores.sum(0), dscores.astype(q.dtype)
    dq = jnp.einsum("bhqk,bkhd->bqhd", dscores, k) * scale
    dk = jnp.einsum("bhqk,bqhd->bkhd", dscores, q) * scale
    return *(x.reshape(like.shape) for x, like in zip((dq, dk, dv), given, strict=True)), dbias


attention.defvjp(_forward, _backward)


def _apart(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], heads, -1)
