"""Softmax attention by cuDNN's fused kernels, which keep no scores in GPU memory.

The custom calls are those that `jax.nn.dot_product_attention(implementation="cudnn")` compiles to. JAX's wrapper (0.10)
is not used, for two reasons. It requires an even number of tokens whenever there is a gradient; cuDNN 9 requires this
only with a bias, but the wrapper mistakes the empty array that means "no bias" for a bias. It also queries cuDNN while
tracing, so that no step could be traced on a machine without cuDNN.

cuDNN sums the gradient of the queries in any order by default. With `xla_gpu_deterministic_ops` (the config field
`train.deterministic`), XLA sets `force_deterministic` in the backward call when it compiles.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mae_jax.ops import partitioning

BY_HEAD = (0, 2, 1, 3)  # layout of cuDNN's results: XLA's shape is [B, H, T, d], the memory order [B, T, H, d]
TOKENS = P(partitioning.ROWS, None, "tensor")  # [B, T, D]
STATISTICS = P(partitioning.ROWS, "tensor", None)  # [B, H, T]


def takes(device: str, q: jax.Array, heads: int) -> bool:
    """Returns whether cuDNN supports queries like q [B, T, D] of `heads` heads on the GPU named `device`."""
    depth = q.shape[-1] // heads
    return q.dtype == jnp.bfloat16 and depth % 8 == 0 and depth <= 128 and not partitioning.OLDER.match(device)


def forward(heads: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the attention [B, T, D] of q, k and v [B, T, D], and the residuals of `backward`."""
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
    """Returns the gradients of queries, keys and values for `dout`, the gradient of the attention [B, T, D]."""
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
    """Returns [B, T, H · d] for [B, H, T, d] in the layout BY_HEAD, whose memory order is the same."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)


# XLA's name of a product → (contracting axis of each operand, batch axes of each operand). Queries, keys and values are
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
    """Calls cuDNN with XLA's `CudnnfMHABackendConfig`; each of `results` is (shape, dtype, layout)."""
    images, tokens, heads, depth = operands[0].shape
    config = {
        # Placeholders: XLA chooses the algorithm and the workspace when it compiles.
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
