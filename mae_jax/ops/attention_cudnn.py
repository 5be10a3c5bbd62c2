"""Softmax attention by cuDNN: one kernel forward and a few back, which keep no scores in the GPU's memory.

The custom calls are those that `jax.nn.dot_product_attention(implementation="cudnn")` compiles to. JAX's own wrapper
(0.10) cannot be used. It wants an even number of tokens wherever there is a gradient, which cuDNN 9 wants only where
there is a bias as well: the wrapper takes the empty array that stands for none for one. And it looks for cuDNN while it
traces, so that no step could be traced where cuDNN is not.

cuDNN adds up the gradient of queries in any order unless it is asked not to: with `xla_gpu_deterministic_ops`, which is
`train.deterministic`, XLA sets `force_deterministic` in the backward call when it compiles.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mae_jax.ops import partitioning

BY_HEAD = (0, 2, 1, 3)  # XLA has cuDNN's results as [B, H, T, d]; in memory they are [B, T, H, d]
TOKENS = P(partitioning.ROWS, None, "tensor")  # [B, T, D]
STATISTICS = P(partitioning.ROWS, "tensor", None)  # [B, H, T]


def takes(device: str, q: jax.Array, heads: int) -> bool:
    """Says whether cuDNN computes this on a GPU of that name: queries [B, T, D] of so many heads."""
    depth = q.shape[-1] // heads
    return q.dtype == jnp.bfloat16 and depth % 8 == 0 and depth <= 128 and not partitioning.OLDER.match(device)


def forward(heads: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the attention [B, T, D], and what `backward` needs."""
    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        operands = [_apart(x, q.shape[-1] * heads // width) for x in (q, k, v)]
        images, tokens, own, depth = operands[0].shape
        results = [((images, own, tokens, depth), q.dtype, BY_HEAD), ((images, own, tokens), jnp.float32, None)]
        out, statistics = _call("__cudnn$fmhaSoftmax", FORWARD, operands, results)
        return _together(out), statistics

    width = q.shape[-1]
    out, statistics = partitioning.on_each_device(local, (TOKENS,) * 3, (TOKENS, STATISTICS))(q, k, v)
    return out, (q, k, v, statistics, out)


def backward(heads: int, saved: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the gradients of queries, keys and values."""
    def local(q: jax.Array, k: jax.Array, v: jax.Array, statistics: jax.Array, out: jax.Array,
              dout: jax.Array) -> tuple[jax.Array, ...]:
        own = statistics.shape[1]
        q, k, v, out, dout = (_apart(x, own) for x in (q, k, v, out, dout))
        images, tokens, _, depth = q.shape
        results = [((images, own, tokens, depth), q.dtype, BY_HEAD)] * 3
        return tuple(map(_together, _call("__cudnn$fmhaSoftmaxBackward", BACKWARD,
                                          [q, k, v, statistics, dout, out], results)))

    specs = (TOKENS, TOKENS, TOKENS, STATISTICS, TOKENS, TOKENS)
    return partitioning.on_each_device(local, specs, (TOKENS,) * 3)(*saved, dout)


def _apart(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], heads, -1)


def _together(x: jax.Array) -> jax.Array:
    """Returns [B, T, H · d] for [B, H, T, d], which in memory is the same."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)


# XLA's name of a product → (axes that are summed, axes of batches) of both operands. Queries, keys and values are
# [B, T, H, d], scores [B, H, T, T].
FORWARD = {
    "bmm1": ((3, 3), ((0, 2), (0, 2))),  # queries, keys → scores
    "bmm2": ((3, 1), ((0, 1), (0, 2))),  # weights, values → out
}
BACKWARD = {
    "bmm1_grad_gemm1": ((2, 1), ((0, 1), (0, 2))),  # dscores, queries → dkeys
    "bmm1_grad_gemm2": ((3, 1), ((0, 1), (0, 2))),  # dscores, keys → dqueries
    "bmm2_grad_gemm1": ((2, 1), ((0, 1), (0, 2))),  # weights, dout → dvalues
    "bmm2_grad_gemm2": ((3, 3), ((0, 2), (0, 2))),  # dout, values → dweights
}


def _call(target: str, products: dict[str, Any], operands: list[jax.Array],
          results: list[tuple[tuple[int, ...], Any, tuple[int, ...] | None]]) -> list[jax.Array]:
    """Calls cuDNN by XLA's `CudnnfMHABackendConfig`; results are (shape, dtype, axes in their order in memory)."""
    images, tokens, heads, depth = operands[0].shape
    config = {
        # XLA chooses algorithm and workspace anew when it compiles.
        "algorithm": {"algo_id": "0", "math_type": "TENSOR_OP_MATH", "tuning_knobs": {"17": "1", "24": "0"},
                      "is_cudnn_frontend": True, "workspace_size": "0"},
        "fmha_scale": depth**-0.5, "dropout_rate": 0.0, "seed": 42, "mask_type": "NO_MASK", "is_flash_attention": True,
        "sliding_window_length": 0, "max_seg_per_batch": 1, "is_paged_attention": False,
        "intermediate_tensor_shape": {
            "element_type": "BF16", "dimensions": [str(size) for size in (images, heads, tokens, tokens)],
            "is_dynamic_dimension": [False] * 4,
            "layout": {"minor_to_major": ["3", "2", "1", "0"], "element_size_in_bits": "0", "memory_space": "0"}},
        **{f"{name}_dot_dimension_numbers": _dimensions(*axes) for name, axes in products.items()},
    }
    workspace = ((0,), jnp.uint8, None)
    call = jax.ffi.ffi_call(
        target, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in (*results, workspace)],
        output_layouts=[order for _, _, order in (*results, workspace)], custom_call_api_version=2,
        legacy_backend_config=json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": config}))
    return call(*operands)[:-1]


def _dimensions(summed: tuple[int, int], batches: tuple[tuple[int, int], tuple[int, int]]) -> dict[str, list[str]]:
    """Returns XLA's `DotDimensionNumbers`."""
    return {"lhs_contracting_dimensions": [str(summed[0])], "rhs_contracting_dimensions": [str(summed[1])],
            "lhs_batch_dimensions": [str(axis) for axis in batches[0]],
            "rhs_batch_dimensions": [str(axis) for axis in batches[1]]}
