"""Randomness on the device: addressed by seed, step and the name of what is drawn, never stored."""

import zlib

import jax


def stream_key(seed: int, step: jax.Array | int, stream: str) -> jax.Array:
    """Returns the random key of a named stream at a step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), zlib.crc32(stream.encode()))
