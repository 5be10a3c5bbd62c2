"""Addressed randomness: every draw is a function of (seed, stream, position), on the host and on the device."""

import functools
import threading
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax

_WORD = (1 << 64) - 1
_lock = threading.Lock()


def rng(seed: int, stream: str, position: int, view: int = 0) -> np.random.Generator:
    """Returns the generator of one address.

    Args:
      seed: the run's seed, any integer.
      stream: what the draws are for ('augment', 'order', ...).
      position: step · batch_size + row, an epoch, or the index of an example; below 2**56.
      view: which view of the image, below 256.
    """
    key = [_mix(_mix(seed & _WORD) ^ zlib.crc32(stream.encode())), position << 8 | view]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order of an epoch, int64 [size]: a true permutation, drawn once and then cached (read-only)."""
    with _lock:  # threads that cross into an epoch together shall draw its permutation once
        return _permutation(seed, epoch, size)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    order = rng(seed, "epoch", epoch).permutation(size)
    order.flags.writeable = False
    return order


def _mix(word: int) -> int:
    """Spreads 64 bits (the finaliser of splitmix64: Steele, Lea and Flood 2014), so that near seeds have far keys."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


def stream_key(seed: int, step: "jax.Array | int", stream: str) -> "jax.Array":
    """Returns the random key of a named stream at a step."""
    import jax  # which the processes that make examples do without

    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), zlib.crc32(stream.encode()))
