"""Softmax attention: one function, and a table of its implementations for different devices.

Implementations differ by rounding only. Each saves little for its backward pass and multiplies in the dtype of the
activations. Autodiff would save float32 attention weights, and multiply float32 gradients of the scores with bfloat16
keys and queries.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mae_jax.ops import attention_cudnn, attention_tpu, attention_tpu_kernel, partitioning

# Maps scores [..., T, T] (queries, keys) to bool of a shape that broadcasts to theirs: which keys a query attends to.
AttentionMask = Callable[[jax.Array], jax.Array]


def attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int, kept: AttentionMask | None = None) -> jax.Array:
    """Returns softmax(q kᵀ / √d) v, [B, T, D], for queries, keys and values [B, T, D] of `heads` heads.

    The softmax is float32. `kept` selects the keys of each query from the float32 scores [B, H, T, T]; no gradient goes
    through the selection.
    """
    return _attention(q, k, v, heads, kept, implementation(q, heads, kept))


def plain(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Returns the attention [B, Q, V] of queries [B, Q, D], keys [B, T, D] and values [B, T, V], on any device."""
    return _attention(q, k, v, heads, None, "plain")


def implementation(q: jax.Array, heads: int, kept: AttentionMask | None = None) -> str:
    """Returns the key of IMPLEMENTATIONS for queries [B, T, D] on the devices of the surrounding mesh."""
    device = partitioning.device()
    if kept or device is None:
        return "plain"
    shared_evenly = q.shape[0] % partitioning.row_shares() == 0  # False for the single image of shape inference
    if device.platform == "tpu":
        if shared_evenly and attention_tpu_kernel.takes(device.device_kind, q, heads):
            return "tpu kernel"
        return device.device_kind if device.device_kind in attention_tpu.WAYS else "tpu"
    if device.platform == "gpu" and shared_evenly and attention_cudnn.takes(device.device_kind, q, heads):
        return "cudnn"
    return "plain"


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int, kept: AttentionMask | None, by: str) -> jax.Array:
    return _forward(q, k, v, heads, kept, by)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, heads: int, kept: AttentionMask | None,
             by: str) -> tuple[jax.Array, Any]:
    return IMPLEMENTATIONS[by].forward(heads, q, k, v, **({"kept": kept} if kept else {}))


def _backward(heads: int, kept: AttentionMask | None, by: str, saved: Any, dout: jax.Array) -> tuple[jax.Array, ...]:
    return IMPLEMENTATIONS[by].backward(heads, saved, dout)


_attention.defvjp(_forward, _backward)


def plain_forward(heads: int, q: jax.Array, k: jax.Array, v: jax.Array,
                  kept: AttentionMask | None = None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the attention [B, T, D] and the residuals of `plain_backward`; values may be narrower than queries.

    The weights [B, H, T, T] among the residuals, in the dtype of q, are not normalized. The division by their sums,
    float32 [B, T, H, 1], follows the product with the values, where it is over the smaller [B, T, H, d].
    """
    given = q, k, v
    q, k, v = (_apart(x, heads) for x in given)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if kept:
        scores = jnp.where(kept(scores), scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    totals = weights.sum(-1).swapaxes(1, 2)[..., None]
    weights = weights.astype(q.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32) / totals
    out = out.astype(q.dtype).reshape(*out.shape[:2], -1)
    return out, (*given, weights, totals, out)


def plain_backward(heads: int, saved: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the gradients of queries, keys and values for `dout`, the gradient of the attention [B, T, D].

    Masked keys have zero weights, and therefore no gradient, so the mask is not computed again.
    """
    *given, weights, totals, out = saved
    q, k, v, out, dout = (_apart(x, heads) for x in (*given, out, dout))
    q = q * q.shape[-1] ** -0.5
    scaled = dout / totals  # float32
    inner = (scaled * out).sum(-1).swapaxes(1, 2)[..., None]
    scaled = scaled.astype(q.dtype)
    dweights = jnp.einsum("bqhd,bkhd->bhqk", scaled, v, preferred_element_type=jnp.float32)
    dscores = (weights * (dweights - inner)).astype(q.dtype)
    dq = jnp.einsum("bhqk,bkhd->bqhd", dscores, k) * q.shape[-1] ** -0.5
    dk = jnp.einsum("bhqk,bqhd->bkhd", dscores, q)
    dv = jnp.einsum("bhqk,bqhd->bkhd", weights, scaled)
    return tuple(x.reshape(like.shape) for x, like in zip((dq, dk, dv), given, strict=True))


def _apart(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], heads, -1)


class Implementation(NamedTuple):
    """Forward and backward pass of attention.

    Attributes:
      forward: (heads, q, k, v) → the attention [B, T, D] and residuals for `backward`.
      backward: (heads, residuals, gradient of the attention) → gradients of q, k, v.
    """

    forward: Callable[..., tuple[jax.Array, Any]]
    backward: Callable[[int, Any, jax.Array], tuple[jax.Array, ...]]


def on_tpu(way: attention_tpu.Way) -> Implementation:
    """Returns the implementation by XLA for a generation of TPUs."""
    return Implementation(partial(attention_tpu.forward, way), partial(attention_tpu.backward, way))


IMPLEMENTATIONS = {
    "plain": Implementation(plain_forward, plain_backward),  # all devices; the only one that supports masks
    "cudnn": Implementation(attention_cudnn.forward, attention_cudnn.backward),  # bfloat16 on NVIDIA GPUs
    "tpu kernel": Implementation(attention_tpu_kernel.forward, attention_tpu_kernel.backward),  # bfloat16, v5e and v6e
    **{kind: on_tpu(way) for kind, way in attention_tpu.WAYS.items()},  # 'tpu': any other kind of TPU
}
