"""Addressed randomness: every draw is a function of (seed, stream, position), on the host and on the device."""

import functools
import math
import threading
import zlib
from typing import TYPE_CHECKING, Any

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
    """Returns the order of an epoch as runs from before have it, int64 [size], drawn once and cached (read-only)."""
    with _lock:  # threads that cross into an epoch together shall draw its permutation once
        return _permutation(seed, epoch, size)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    order = rng(seed, "epoch", epoch).permutation(size)
    order.flags.writeable = False
    return order


ROUNDS = 12  # of `example_at`; from 10 on, chi-squares over places, pairs and orders of a few examples show nothing


def example_at(seed: int, epoch: int, size: int, place: Any, stream: str = "epoch") -> Any:
    """Returns which example stands at a place of an epoch's order: for all places together, a permutation.

    A generalized Feistel network (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): a number is written
    with two digits of bases a and b, a · b being at least the size; in turns each digit is shifted by a keyed hash of
    the other one. Results that are no example are put in again until one is. Nothing is stored, whatever the size.

    Args:
      seed: the run's seed.
      epoch: whose order it is; each has keys of its own.
      size: the number of examples, below 2**62.
      place: int, or an array of uint64, each below the size.
      stream: what the order is for.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    keys = _keys(seed, epoch, stream)
    found = _feistel(keys, a, b, place)
    if isinstance(found, int):
        while found >= size:
            found = _feistel(keys, a, b, found)
        return found
    while len(outside := np.flatnonzero(found >= size)):
        found[outside] = _feistel(keys, a, b, found[outside])
    return found


def _feistel(keys: tuple[int, ...], a: int, b: int, number: Any) -> Any:
    high, low = number // b, number % b
    for number, key in enumerate(keys):
        if number % 2:
            low = (low + _mix(high ^ key) % b) % b
        else:
            high = (high + _mix(low ^ key) % a) % a
    return high * b + low


@functools.lru_cache(maxsize=64)
def _keys(seed: int, epoch: int, stream: str) -> tuple[int, ...]:
    return tuple(rng(seed, stream, epoch).integers(0, _WORD, ROUNDS, np.uint64, endpoint=True).tolist())


def _mix(word: Any) -> Any:
    """Spreads 64 bits, of an int or an array of uint64, so that near seeds have far keys.

    It is the finaliser of splitmix64 (Steele, Lea and Flood 2014).
    """
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


def stream_key(seed: int, step: "jax.Array | int", stream: str) -> "jax.Array":
    """Returns the random key of a named stream at a step."""
    import jax  # which the processes that make examples do without

    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), zlib.crc32(stream.encode()))
