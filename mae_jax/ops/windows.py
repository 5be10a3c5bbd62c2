"""Attention over a grid of tokens: in windows, with decomposed relative positions, and with very many tokens.

Decomposed relative positions (MViTv2, arXiv 2112.01526, equation 4; ViTDet) add to the score of a query and a key the
products of the query with two embeddings: of their distance in rows, and of their distance in columns. They are folded
exactly into longer queries and keys, q' = [q · d^-1/2 | q · R_rows | q · R_columns] and k' = [k | one-hot row | one-hot
column]. So every implementation of attention supports them, and no bias [T, T] is stored.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops.attention import attention, implementation, plain
from mae_jax.ops.resampling import interpolation

TOGETHER = 512  # queries per chunk, if queries are processed in chunks (our choice)
MANY = 1024  # more tokens than this are processed in chunks of queries (our choice)
LANES = 8  # cuDNN requires the depth of a head to be a multiple of this


class Spatial(NamedTuple):
    """Spatial attention of a block, whose tokens are the patches of a grid in raster order.

    Attributes:
      grid: patches along (height, width).
      window: patches per side of square, non-overlapping windows within which patches attend; 0: global attention.
      relative: whether there are learned, decomposed relative positions.
    """

    grid: tuple[int, int]
    window: int = 0
    relative: bool = False

    @property
    def sides(self) -> tuple[int, int]:
        """Patches along (height, width) of a window, or of the grid with global attention."""
        return (self.window, self.window) if self.window else self.grid


def part(x: jax.Array, grid: tuple[int, int], window: int) -> jax.Array:
    """Splits tokens [B, rows · columns, D] into n windows each, [B · n, window², D], padded with zeros as in ViTDet."""
    images, _, width = x.shape
    down, across = (-side % window for side in grid)
    x = jnp.pad(x.reshape(images, *grid, width), ((0, 0), (0, down), (0, across), (0, 0)))
    rows, columns = (grid[0] + down) // window, (grid[1] + across) // window
    x = x.reshape(images, rows, window, columns, window, width).swapaxes(2, 3)
    return x.reshape(images * rows * columns, window * window, width)


def join(x: jax.Array, grid: tuple[int, int], window: int) -> jax.Array:
    """Inverts `part` and removes the padding: [B · n, window², D] → [B, rows · columns, D]."""
    rows, columns = (-(-side // window) for side in grid)
    x = x.reshape(-1, rows, columns, window, window, x.shape[-1]).swapaxes(2, 3)
    x = x.reshape(-1, rows * window, columns * window, x.shape[-1])[:, :grid[0], :grid[1]]
    return x.reshape(len(x), grid[0] * grid[1], x.shape[-1])


def relative_attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int, tables: tuple[jax.Array, jax.Array] | None,
                       sides: tuple[int, int]) -> jax.Array:
    """Returns the attention [B, T, D] of queries, keys and values [B, T, D], with or without relative positions.

    Args:
      q, k, v: [B, T, D]; with `tables`, of patches in raster order.
      heads: number of heads, of depth d = D / heads.
      tables: embeddings of the differences query - key in rows, float32 [2 · rows - 1, d], and in columns, float32
        [2 · columns - 1, d], from the lowest difference; None: no relative positions.
      sides: (rows, columns), whose product is T; read only with `tables`.
    """
    if tables is not None:
        q, k = _with_positions(q, k, heads, tables, sides)
    tokens, depth = q.shape[1], q.shape[-1] // heads
    if tokens > MANY and implementation(q, heads) != "cudnn":
        return _by_parts(q, k, v, heads)
    if implementation(q, heads) == "plain":
        return plain(q, k, v, heads)
    short = depth - v.shape[-1] // heads  # other implementations require q, k and v of equal width
    if not short:
        return attention(q, k, v, heads)
    padded = jnp.pad(v.reshape(*v.shape[:2], heads, -1), ((0, 0),) * 3 + ((0, short),)).reshape(q.shape)
    out = attention(q, k, padded, heads).reshape(*q.shape[:2], heads, depth)
    return out[..., :depth - short].reshape(v.shape)


def _with_positions(q: jax.Array, k: jax.Array, heads: int, tables: tuple[jax.Array, jax.Array],
                    sides: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Returns extended queries and keys [B, T, heads · d']; q' k'ᵀ · d'^-1/2 are the scores with relative positions."""
    rows, columns = sides
    q, k = (x.reshape(len(x), rows, columns, heads, -1) for x in (q, k))
    depth, short = q.shape[-1], -(q.shape[-1] + rows + columns) % LANES
    down, across = (_between(table, side).astype(q.dtype) for table, side in zip(tables, sides, strict=True))
    # Positions multiply the query without d^-1/2. All is float32 until the extended query is scaled.
    vertical = jnp.einsum("byxhd,ykd->byxhk", q, down, preferred_element_type=jnp.float32)
    horizontal = jnp.einsum("byxhd,xkd->byxhk", q, across, preferred_element_type=jnp.float32)
    total = depth + rows + columns + short
    longer = jnp.concatenate([q.astype(jnp.float32) * depth**-0.5, vertical, horizontal], -1) * total**0.5
    y, x = (jnp.asarray(place) for place in np.indices(sides))
    places = jnp.concatenate([jax.nn.one_hot(y, rows, dtype=k.dtype), jax.nn.one_hot(x, columns, dtype=k.dtype)], -1)
    keys = jnp.concatenate([k, jnp.broadcast_to(places[:, :, None], (*k.shape[:-1], rows + columns))], -1)
    q, k = (jnp.pad(x, ((0, 0),) * 4 + ((0, short),)) for x in (longer.astype(q.dtype), keys))
    return q.reshape(len(q), rows * columns, -1), k.reshape(len(k), rows * columns, -1)


def _between(table: jax.Array, side: int) -> jax.Array:
    """Looks up [side (query), side (key), d] in a table [2 · side - 1, d] by a product, whose gradient has no scatter.
    """
    place = np.arange(side)
    chosen = jax.nn.one_hot(place[:, None] - place + side - 1, 2 * side - 1, dtype=table.dtype)
    return jnp.einsum("qkp,pd->qkd", chosen, table, precision="highest")


def _by_parts(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Returns the attention [B, T, width of v] by chunks of TOGETHER queries; the gradient recomputes their scores."""
    images, tokens, width = q.shape
    parts = jnp.pad(q, ((0, 0), (0, -tokens % TOGETHER), (0, 0))).reshape(images, -1, TOGETHER, width).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(partial(plain, k=k, v=v, heads=heads)), parts)
    return out.swapaxes(0, 1).reshape(images, -1, v.shape[-1])[:, :tokens]


def resized(table: np.ndarray, to: int) -> np.ndarray:
    """Resizes a table of relative positions [L, D] to float32 [to, D] by linear interpolation, as Detectron2 does."""
    return (interpolation(len(table), to) @ table).astype(np.float32)
