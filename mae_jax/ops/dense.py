"""The linear layer and the GELU, with gradients that keep float32 sums and few saved activations."""

import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x @ kernel + bias [..., D] in the dtype of x [..., K], for float32 kernel [K, D] and bias [D].

    The gradients of kernel and bias are summed, and leave, in float32 whatever the dtype of x: autodiff would round
    them to it before they are summed over devices. All leading axes are flattened for the products: with two axes to
    contract, XLA may recompute what produced an operand while it transposes it.
    """
    y = _rows(x) @ kernel.astype(x.dtype) + bias.astype(x.dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def _linear_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return linear(x, kernel, bias), (x, kernel, bias)


def _linear_backward(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
    x, kernel, bias = saved
    rows = _rows(dy)
    dx = rows @ kernel.astype(x.dtype).T
    dkernel = jax.lax.dot_general(_rows(x), rows, (((0,), (0,)), ((), ())), preferred_element_type=kernel.dtype)
    return dx.reshape(x.shape), dkernel, rows.sum(0, dtype=bias.dtype)


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Returns the exact GELU, x · Φ(x) (arXiv 1606.08415), computed in float32; the gradient needs x alone."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) / np.sqrt(2 * np.pi)
    return ((dy * (_normal_cdf(wide) + wide * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * np.float32(np.sqrt(0.5))))


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])
