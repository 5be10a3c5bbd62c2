"""The gradient of layer norm on NVIDIA GPUs: one Triton kernel, which reads and writes each array once.

XLA (jaxlib 0.10) does not fuse sums over the features with sums over the vectors. It reads x and the gradient once for
each kind, and once more if there are three sums over the vectors.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec as P

from mae_jax.ops import partitioning

PROGRAMS = 132  # streaming multiprocessors of an H100; each program writes partial sums
TILE = 8192  # values of each array per step of a program: 16 per thread
WARPS = 16


def backward(x: jax.Array, scale: jax.Array, dy: jax.Array, residual: jax.Array | None = None, *,
             eps: float) -> tuple[jax.Array, ...]:
    """Returns the gradients of x [B, ..., D], and of scale and bias, float32 [D].

    Args:
      x: input of the norm, [B, ..., D].
      scale: [D].
      dy: gradient of the norm, like x.
      residual: a further gradient of x, like x, which is added to the result. Its sum over all vectors, float32 [D], is
        then returned as a fourth array.
      eps: added to the variance.
    """
    given = (x, dy) if residual is None else (x, dy, residual)

    def local(scale: jax.Array, *given: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = [part.reshape(-1, part.shape[-1]) for part in given]
        sums = jax.ShapeDtypeStruct((PROGRAMS, len(given), rows[0].shape[1]), jnp.float32)
        dx, sums = _call(partial(_kernel, eps), (jax.ShapeDtypeStruct(rows[0].shape, x.dtype), sums))(scale, *rows)
        return dx.reshape(given[0].shape), sums

    spec = P(partitioning.ROWS)
    dx, sums = partitioning.on_each_device(local, (P(), *(spec,) * len(given)), (spec, spec))(scale, *given)
    # The barrier keeps this one sum; without it, XLA would compute a separate sum for each of the slices.
    return dx, *jax.lax.optimization_barrier(sums.sum(0))


def _call(kernel: Any, results: Any) -> Any:
    return pl.pallas_call(kernel, results, grid=(PROGRAMS,), name="layer_norm_gradient",
                          compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2))


def _kernel(eps: float, scale_ref: Any, x_ref: Any, dy_ref: Any, *refs: Any) -> None:
    """One program: computes its rows of dx, tile by tile, and the sums over these rows."""
    *residual_ref, dx_ref, sums_ref = refs
    count, width = x_ref.shape
    lanes = pl.next_power_of_2(width)
    tall = max(TILE // lanes, 1)
    tiles = pl.cdiv(count, PROGRAMS * tall)
    program, columns = pl.program_id(0), jnp.arange(lanes)
    inside = columns < width
    scale = triton.load(scale_ref.at[columns], mask=inside, other=0.0)

    def tile(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rows = (program * tiles + index) * tall + jnp.arange(tall)
        place, mask = (rows[:, None], columns[None]), (rows < count)[:, None] & inside[None]
        x, dy, *residual = (triton.load(ref.at[place], mask=mask, other=0.0).astype(jnp.float32)
                            for ref in (x_ref, dy_ref, *residual_ref))
        centered = jnp.where(mask, x - x.sum(1, keepdims=True) / width, 0.0)
        rate = jax.lax.rsqrt((centered * centered).sum(1, keepdims=True) / width + eps)
        normal, inner = centered * rate, dy * scale
        shift, product = (part.sum(1, keepdims=True) / width for part in (inner, inner * normal))
        dx = (inner - shift - normal * product) * rate
        triton.store(dx_ref.at[place], sum(residual, dx).astype(dx_ref.dtype), mask=mask)
        return tuple(total + part.sum(0) for total, part in zip(sums, (dy * normal, dy, *residual), strict=True))

    zeros = (jnp.zeros(lanes, jnp.float32),) * sums_ref.shape[1]
    for number, total in enumerate(jax.lax.fori_loop(0, tiles, tile, zeros)):
        triton.store(sums_ref.at[program, number, columns], total, mask=inside)
