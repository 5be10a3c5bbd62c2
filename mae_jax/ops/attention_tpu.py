"""Softmax attention as TPUs compute it fastest."""

import jax
import jax.numpy as jnp
import numpy as np

LANES = 128  # of a TPU's vector registers and matrix unit

# On TPUs what bounds attention is the way to and from memory (benchmarks/results/tpu_step.md), so that
# - scores stay out of memory. XLA fuses a product with what follows it, but not with two things in turn: the product is
#   taken three times, for the largest score, for the sum, and for the weights. Barriers keep XLA from merging them.
# - as many heads as fill the lanes stay side by side (S heads in one group of lanes, where a head has a half of them):
#   to part them would double what is moved. The products tell them apart by zeros in one operand, which a matrix unit
#   as wide as the lanes multiplies in no time.


def forward(heads: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the attention [B, T, D], and what `backward` needs."""
    images, tokens, width = q.shape
    given = q, k, v
    q, k, v = (_groups(x, heads) for x in given)
    largest = _scores(q, k, width, heads).max(-1, keepdims=True)
    q, k, largest = jax.lax.optimization_barrier((q, k, largest))
    total = largest + jnp.log(jnp.exp(_scores(q, k, width, heads) - largest).sum(-1, keepdims=True))
    q, k, total = jax.lax.optimization_barrier((q, k, total))
    weights = jnp.exp(_scores(q, k, width, heads) - total).astype(q.dtype)
    out = _ungroup(jnp.einsum("nsqk,nskd->nqd", weights, _masked(v, width, heads)), images)
    # Without the barrier, XLA would keep what `out` is rounded from, in float32.
    out = jax.lax.optimization_barrier(out)
    return out, (*given, weights.reshape(images, heads, tokens, tokens), out)


def backward(heads: int, saved: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the gradients of queries, keys and values."""
    q, k, v, weights, out = saved
    images, tokens, width = q.shape
    q, k, v, out, dout = (_groups(x, heads) for x in (q, k, v, out, dout))
    out, dout = jax.lax.optimization_barrier((out, dout))  # else the float32 product below is regrouped
    weights = weights.reshape(len(q), -1, tokens, tokens)
    inner = _masked(dout.astype(jnp.float32) * out, width, heads).sum(-1, keepdims=True)
    dweights = jnp.einsum("nqd,nskd->nsqk", dout, _masked(v, width, heads), preferred_element_type=jnp.float32)
    dscores = (weights * (dweights - inner) * (width // heads) ** -0.5).astype(q.dtype)
    dq = jnp.einsum("nsqk,nskd->nqd", dscores, _masked(k, width, heads))
    dk = jnp.einsum("nsqk,nsqd->nkd", dscores, _masked(q, width, heads))
    dv = jnp.einsum("nsqk,nsqd->nkd", weights, _masked(dout, width, heads))
    return _ungroup(dq, images), _ungroup(dk, images), _ungroup(dv, images)


def _scores(q: jax.Array, k: jax.Array, width: int, heads: int) -> jax.Array:
    """Returns float32 scores [N, S, T, T] of groups [N, T, S·d]."""
    scores = jnp.einsum("nqd,nskd->nsqk", q, _masked(k, width, heads), preferred_element_type=jnp.float32)
    return scores * (width // heads) ** -0.5


def _together(width: int, heads: int) -> int:
    """Returns S, how many heads stay side by side: two of half the lanes each, else one."""
    return 2 if 2 * width == heads * LANES and heads % 2 == 0 else 1


def _groups(x: jax.Array, heads: int) -> jax.Array:
    """Returns [B·H/S, T, S·d] for [B, T, H·d]."""
    images, tokens, width = x.shape
    groups = heads // _together(width, heads)
    return x.reshape(images, tokens, groups, -1).swapaxes(1, 2).reshape(images * groups, tokens, -1)


def _ungroup(x: jax.Array, images: int) -> jax.Array:
    """Inverts `_groups`."""
    _, tokens, width = x.shape
    return x.reshape(images, -1, tokens, width).swapaxes(1, 2).reshape(images, tokens, -1)


def _masked(x: jax.Array, width: int, heads: int) -> jax.Array:
    """Returns [N, S, T, S·d] for [N, T, S·d]: the s-th copy has zeros in all lanes but those of the s-th head."""
    together = _together(width, heads)
    if together == 1:
        return x[:, None]
    mask = np.repeat(np.eye(together), x.shape[-1] // together, axis=1)
    return x[:, None] * jnp.asarray(mask, x.dtype)[:, None]
