"""Attention over a grid of tokens: in windows, with relative positions, and where there are very many tokens.

Decomposed relative positions (MViTv2, arXiv 2112.01526, equation 4; ViTDet) add to the score of a query and a key a
product of the query with an embedding of how many rows, and one of how many columns, lie between them. They are folded
into longer queries and keys, exactly: q' = [q · d^-1/2 | q · R_rows | q · R_columns] and k' = [k | one-hot row |
one-hot column], so that any attention will do, and no bias [T, T] is in memory.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops.attention import attention, implementation, plain
from mae_jax.ops.resampling import interpolation

TOGETHER = 512  # queries whose scores are in memory at once, where there are many (our choice)
MANY = 1024  # tokens from which on they are parted (our choice)
LANES = 8  # what cuDNN wants the depth of a head to be a multiple of


class Spatial(NamedTuple):
    """How a block attends over its image's grid of patches, which come in raster order.

    Attributes:
      grid: patches along (height, width).
      window: patches per side of the square windows that do not see each other; 0: all see all.
      relative: whether there are relative positions, learned.
    """

    grid: tuple[int, int]
    window: int = 0
    relative: bool = False

    @property
    def sides(self) -> tuple[int, int]:
        """Patches along (height, width) that see each other."""
        return (self.window, self.window) if self.window else self.grid


def part(x: jax.Array, grid: tuple[int, int], window: int) -> jax.Array:
    """Returns windows [B · n, window², D] of tokens [B, rows · columns, D]; what is past the grid is 0, as in ViTDet.
    """
    images, _, width = x.shape
    down, across = (-side % window for side in grid)
    x = jnp.pad(x.reshape(images, *grid, width), ((0, 0), (0, down), (0, across), (0, 0)))
    rows, columns = (grid[0] + down) // window, (grid[1] + across) // window
    x = x.reshape(images, rows, window, columns, window, width).swapaxes(2, 3)
    return x.reshape(images * rows * columns, window * window, width)


def join(x: jax.Array, grid: tuple[int, int], window: int) -> jax.Array:
    """Inverts `part`."""
    rows, columns = (-(-side // window) for side in grid)
    x = x.reshape(-1, rows, columns, window, window, x.shape[-1]).swapaxes(2, 3)
    x = x.reshape(-1, rows * window, columns * window, x.shape[-1])[:, :grid[0], :grid[1]]
    return x.reshape(len(x), grid[0] * grid[1], x.shape[-1])


def relative_attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int, tables: tuple[jax.Array, jax.Array] | None,
                       sides: tuple[int, int]) -> jax.Array:
    """Returns the attention [B, T, D] of queries, keys and values [B, T, D], with relative positions or without.

    Args:
      q, k, v: in raster order.
      heads: of depth d = D / heads.
      tables: float32 [2 · rows - 1, d] and [2 · columns - 1, d]: the embedding of a query's row less a key's, from
        1 - rows on, and that of columns; None: no such positions.
      sides: (rows, columns), whose product is T; of tokens that are no grid it is not read.
    """
    if tables is not None:
        q, k = _with_positions(q, k, heads, tables, sides)
    tokens, depth = q.shape[1], q.shape[-1] // heads
    if tokens > MANY and implementation(q, heads) != "cudnn":
        return _by_parts(q, k, v, heads)
    if implementation(q, heads) == "plain":
        return plain(q, k, v, heads)
    short = depth - v.shape[-1] // heads  # the other ways want queries, keys and values of one width
    if not short:
        return attention(q, k, v, heads)
    padded = jnp.pad(v.reshape(*v.shape[:2], heads, -1), ((0, 0),) * 3 + ((0, short),)).reshape(q.shape)
    out = attention(q, k, padded, heads).reshape(*q.shape[:2], heads, depth)
    return out[..., :depth - short].reshape(v.shape)


def _with_positions(q: jax.Array, k: jax.Array, heads: int, tables: tuple[jax.Array, jax.Array],
                    sides: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Returns queries and keys [B, T, heads · d'], whose products times d'^-1/2 are the scores with positions."""
    rows, columns = sides
    q, k = (x.reshape(len(x), rows, columns, heads, -1) for x in (q, k))
    depth, short = q.shape[-1], -(q.shape[-1] + rows + columns) % LANES
    down, across = (_between(table, side).astype(q.dtype) for table, side in zip(tables, sides, strict=True))
    # Of the query as it is, not times d^-1/2; in float32 until all of it is scaled.
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
    """Returns [side (query), side (key), d] of a table [2 · side - 1, d], by a product: a look-up's gradient scatters.
    """
    place = np.arange(side)
    chosen = jax.nn.one_hot(place[:, None] - place + side - 1, 2 * side - 1, dtype=table.dtype)
    return jnp.einsum("qkp,pd->qkd", chosen, table, precision="highest")


def _by_parts(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Returns the attention of some queries after the others, whose scores are computed anew for the gradient."""
    images, tokens, width = q.shape
    parts = jnp.pad(q, ((0, 0), (0, -tokens % TOGETHER), (0, 0))).reshape(images, -1, TOGETHER, width).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(partial(plain, k=k, v=v, heads=heads)), parts)
    return out.swapaxes(0, 1).reshape(images, -1, v.shape[-1])[:, :tokens]


def resized(table: np.ndarray, to: int) -> np.ndarray:
    """Returns relative positions [to, D] of [L, D], linear between them, as Detectron2 resizes them."""
    return (interpolation(len(table), to) @ table).astype(np.float32)
