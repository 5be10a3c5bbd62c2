"""Normalization of vectors."""

import jax
import jax.numpy as jnp


def unit(x: jax.Array) -> jax.Array:
    """Returns vectors [..., D] scaled to length 1; those of no length stay, and have finite gradients."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))
