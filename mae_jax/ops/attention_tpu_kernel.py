"""Softmax attention by Pallas kernels for TPUs, one forward and one backward, which keep no scores in memory.

A program handles all tokens of a few images in one group of 128 lanes: one head of depth 128, two of 64 or four of 32.
The heads of a group are told apart by zeros in one operand of each product; narrower products would take the matrix
unit as long. The backward kernel recomputes the softmax, so that only queries, keys and values are saved.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jax.sharding import PartitionSpec as P

from mae_jax.ops import partitioning

KINDS = ("TPU v5 lite", "TPU v6 lite")  # kinds of devices for which the kernels were compiled
LANES = 128
MAX_TOKENS = 512  # several float32 arrays [T, T] must fit into on-chip memory
TOKENS = 512  # target number of tokens per program
SPEC = P(partitioning.ROWS, None, "tensor")  # sharding of [B, T, D]


def takes(device: str, q: jax.Array, heads: int) -> bool:
    """Returns whether the kernels support queries like q [B, T, D] of `heads` heads on TPUs of kind `device`."""
    own = q.shape[-1] // partitioning.sizes().get("tensor", 1)
    return (device in KINDS and q.dtype == jnp.bfloat16 and LANES % (q.shape[-1] // heads) == 0 and own % LANES == 0
            and q.shape[1] <= MAX_TOKENS)


def forward(heads: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the attention [B, T, D] of q, k and v [B, T, D], and the residuals of `backward`."""
    out, = _on_each_device(_forward, q.shape[-1] // heads, 1, 2, "attention", q, k, v)
    return out, (q, k, v)


def backward(heads: int, saved: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the gradients of queries, keys and values for `dout`, the gradient of the attention [B, T, D]."""
    return _on_each_device(_backward, dout.shape[-1] // heads, 3, 5, "attention_gradient", *saved, dout)


def _on_each_device(kernel: Any, depth: int, results: int, products: int, name: str, *given: jax.Array
                    ) -> tuple[jax.Array, ...]:
    """Runs a kernel on each device's part of arrays [B, T, D]; returns `results` arrays [B, T, D].

    `products` is the number of matrix products per head, for the cost estimate.
    """
    def local(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        images, tokens, width = arrays[0].shape
        programs = grid(images, tokens, width)
        block = pl.BlockSpec((images // programs[0], tokens, LANES), lambda image, group: (image, 0, group))
        scores = images * width // depth * tokens**2
        cost = pl.CostEstimate(  # includes multiplications by zero, as XLA's own estimates do
            flops=2 * LANES * products * scores, transcendentals=scores,
            bytes_accessed=(len(arrays) + results) * arrays[0].size * arrays[0].dtype.itemsize)
        shape = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
        call = _call(partial(kernel, depth), [shape] * results, name=name, cost_estimate=cost,
                     grid=programs, in_specs=[block] * len(arrays), out_specs=[block] * results)
        return tuple(call(*arrays))

    return partitioning.on_each_device(local, (SPEC,) * len(given), (SPEC,) * results)(*given)


def grid(images: int, tokens: int, width: int) -> tuple[int, int]:
    """Returns the numbers of programs along the images and along the lanes of arrays [B, T, D]."""
    some = max(n for n in range(1, max(1, TOKENS // tokens) + 1) if images % n == 0)
    return images // some, width // LANES


def _call(kernel: Any, results: Any, **how: Any) -> Any:
    independent = tpu.CompilerParams(dimension_semantics=("parallel", "parallel"))
    return pl.pallas_call(kernel, results, compiler_params=independent, **how)


def _forward(depth: int, q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any) -> None:
    q, k, v = (ref[...] for ref in (q_ref, k_ref, v_ref))
    out = jnp.zeros(q.shape, jnp.float32)
    for head in _heads(depth, q.shape):
        weights = _softmax(_only(head, q), k, depth).astype(q.dtype)
        out += _product(weights, _only(head, v), 2, 1)
    out_ref[...] = out.astype(out_ref.dtype)


def _backward(depth: int, q_ref: Any, k_ref: Any, v_ref: Any, dout_ref: Any, *gradient_refs: Any) -> None:
    q, k, v, dout = (ref[...] for ref in (q_ref, k_ref, v_ref, dout_ref))
    dq = dk = dv = jnp.zeros(q.shape, jnp.float32)
    for head in _heads(depth, q.shape):
        own_q, own_dout = _only(head, q), _only(head, dout)
        weights = _softmax(own_q, k, depth)
        dweights = _product(own_dout, v, 2, 2)
        inner = (weights * dweights).sum(2, keepdims=True)
        dscores = (weights * (dweights - inner) * depth**-0.5).astype(q.dtype)
        dq += _product(dscores, _only(head, k), 2, 1)
        dk += _product(dscores, own_q, 1, 1)
        dv += _product(weights.astype(q.dtype), own_dout, 1, 1)
    for ref, gradient in zip(gradient_refs, (dq, dk, dv), strict=True):
        ref[...] = gradient.astype(ref.dtype)


def _heads(depth: int, shape: tuple[int, ...]) -> list[jax.Array]:
    """Returns one mask bool [n, T, 128] per head of a group: True in the lanes of that head."""
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    return [(lane >= first) & (lane < first + depth) for first in range(0, LANES, depth)]


def _only(head: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x [n, T, 128] with zeros in the lanes of other heads."""
    return jnp.where(head, x, jnp.zeros_like(x))


def _softmax(q: jax.Array, k: jax.Array, depth: int) -> jax.Array:
    """Returns the attention weights float32 [n, T, T] of one head, for queries that are zero in other heads."""
    scores = _product(q, k, 2, 2) * depth**-0.5
    weights = jnp.exp(scores - scores.max(2, keepdims=True))
    return weights / weights.sum(2, keepdims=True)


def _product(a: jax.Array, b: jax.Array, *summed: int) -> jax.Array:
    """Returns the float32 product of a and b per image; `summed` is the contracting axis of each operand."""
    axes = tuple((axis,) for axis in summed)
    return jax.lax.dot_general(a, b, (axes, ((0,), (0,))), preferred_element_type=jnp.float32)
