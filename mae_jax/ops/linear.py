"""The linear layer and the GELU, with gradients that sum in float32 and save few activations."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mae_jax.ops import partitioning


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array, split: str = "") -> jax.Array:
    """Returns x · kernel + bias, [..., *F] in the dtype of x.

    The gradient of the kernel is summed and returned in the kernel's dtype. Autodiff would round each device's float32
    sum to the dtype of x, bfloat16, before summing over devices. Each device sums over its own rows; the sums are then
    reduce-scattered to the kernel's shards.

    Args:
      x: [..., K].
      kernel: [K, *F].
      bias: [*F].
      split: dimension of the kernel that is sharded along the mesh axis `tensor`: 'in' (K), 'out' (the last) or ''.
    """
    return _linear_forward(x, kernel, bias, split)[0]


def _linear_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array,
                    split: str) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    whole = partitioning.gather(kernel.astype(x.dtype), split)
    y = _rows_times(x, whole) + bias.astype(x.dtype)
    return y, (x, whole, kernel, bias)


def _linear_backward(split: str, saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
    x, whole, kernel, bias = saved
    dx = _rows_times(dy, whole, transposed=True)
    dkernel = _sum_over_rows(x, dy, kernel, split)
    return dx, dkernel, dy.sum(range(dy.ndim - bias.ndim), dtype=bias.dtype)


linear.defvjp(_linear_forward, _linear_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def linears(x: jax.Array, kernel: jax.Array, bias: jax.Array, split: str = "") -> tuple[jax.Array, ...]:
    """Returns x · kernel[:, n] + bias[n], [..., F], for each n, for x [..., K], kernel [K, N, F] and bias [N, F].

    The backward pass joins the gradients of the N results and computes one product, with fewer passes over x and its
    gradient than N calls of `linear`. The forward pass computes N products, since slices of one result would be copied.
    """
    return _linears_forward(x, kernel, bias, split)[0]


def _linears_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array,
                     split: str) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    whole = partitioning.gather(kernel.astype(x.dtype), split)
    parts = tuple(_rows_times(x, whole[:, n]) + bias[n].astype(x.dtype) for n in range(kernel.shape[1]))
    return parts, (x, whole, kernel, bias)


def _linears_backward(split: str, saved: tuple[jax.Array, ...], dys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    # A sum of padded parts: unlike a concatenation, XLA fuses it with the sum of the bias's gradient.
    last = len(dys) - 1
    padded = [jnp.pad(dy[..., None, :], [(0, 0)] * (dy.ndim - 1) + [(n, last - n), (0, 0)]) for n, dy in enumerate(dys)]
    return _linear_backward(split, saved, sum(padded))


linears.defvjp(_linears_forward, _linears_backward)


def _sum_over_rows(x: jax.Array, dy: jax.Array, kernel: jax.Array, split: str) -> jax.Array:
    """Returns the kernel's gradient [K, *F], summed over all rows of the global batch and sharded like the kernel."""
    mesh = partitioning.sizes()
    if not mesh or max(mesh.values()) == 1:
        return _rows_product(x, dy, kernel.dtype)
    spec = partitioning.kernel_spec(kernel.shape, split, mesh)

    def local(x: jax.Array, dy: jax.Array) -> jax.Array:
        return partitioning.sum_to(_rows_product(x, dy, kernel.dtype), spec)

    def rows(array: jax.Array, share: bool) -> P:
        return P(partitioning.ROWS, *[None] * (array.ndim - 2), "tensor" if share else None)

    cut = "tensor" in partitioning.axes_of(spec)
    return jax.shard_map(local, in_specs=(rows(x, cut and split == "in"), rows(dy, cut and split == "out")),
                         out_specs=spec, check_vma=False)(x, dy)


def _rows_times(x: jax.Array, kernel: jax.Array, transposed: bool = False) -> jax.Array:
    """Returns x [..., K] · kernel [K, *F] as [..., *F], or x [..., *F] · kernelᵀ as [..., K]."""
    features = kernel.ndim - 1

    def whole(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if transposed:
            own = tuple(range(x.ndim - features, x.ndim))
            return jax.lax.dot_general(x, kernel, ((own, tuple(range(1, features + 1))), ((), ())))
        return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))

    def flat(x: jax.Array, kernel: jax.Array) -> jax.Array:
        matrix = kernel.reshape(kernel.shape[0], -1)
        if transposed:
            leading = x.shape[: x.ndim - features]
            return (x.reshape(math.prod(leading), -1) @ matrix.T).reshape(*leading, -1)
        return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], *kernel.shape[1:])

    return jax.lax.platform_dependent(x, kernel, tpu=whole, default=flat)


def _rows_product(x: jax.Array, dy: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns Σ over rows of x [..., K] ⊗ dy [..., *F], summed in `dtype`, as [K, *F]."""
    axes = tuple(range(x.ndim - 1))

    def whole(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, dy, ((axes, axes), ((), ())), preferred_element_type=dtype)

    def flat(x: jax.Array, dy: jax.Array) -> jax.Array:
        x, rows = x.reshape(-1, x.shape[-1]), dy.reshape(math.prod(x.shape[:-1]), -1)
        product = jax.lax.dot_general(x, rows, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        return product.reshape(x.shape[-1], *dy.shape[len(axes):])

    return jax.lax.platform_dependent(x, dy, tpu=whole, default=flat)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Returns the exact GELU of x [...], x · Φ(x) (arXiv 1606.08415), computed in float32; only x is saved."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), _as_rounded(x)


def _gelu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) / np.sqrt(2 * np.pi)
    return ((dy * (_normal_cdf(wide) + wide * density)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _as_rounded(x: jax.Array) -> jax.Array:
    """Returns x behind a barrier; without it, XLA would save the float32 values that x was rounded from."""
    return jax.lax.optimization_barrier(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * np.float32(np.sqrt(0.5))))
