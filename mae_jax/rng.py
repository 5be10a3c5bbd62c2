"""Stateless random numbers: every draw is a function of (seed, stream, position), on the host and on the device."""

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
    """Returns the NumPy generator for one position of a stream.

    Args:
      seed: the run's seed, any integer.
      stream: name of the kind of draw ('augment', 'order', ...).
      position: step · batch_size + row, an epoch, or the index of an example; below 2**56.
      view: index of the view of the image, below 256.
    """
    key = [_mix(_mix(seed & _WORD) ^ zlib.crc32(stream.encode())), position << 8 | view]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order of an epoch before recipe_version 5, int64 [size] (read-only), drawn once and cached."""
    with _lock:  # several threads may begin an epoch at once; only one draws its permutation
        return _permutation(seed, epoch, size)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    order = rng(seed, "epoch", epoch).permutation(size)
    order.flags.writeable = False
    return order


ROUNDS = 12  # Feistel rounds of `example_at`; with 10 or more, chi-squared tests of small permutations find no bias


def example_at(seed: int, epoch: int, size: int, place: Any, stream: str = "epoch") -> Any:
    """Returns the example at each place of an epoch's order, a pseudorandom permutation that takes no memory.

    It is a generalized Feistel network (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). A number has
    two digits with the bases a and b, where a · b ≥ size; in turns, each digit is shifted by a keyed hash of the other.
    Results that are not below `size` are encrypted again until they are (cycle walking).

    Args:
      seed: the run's seed.
      epoch: index of the epoch; each epoch has its own order.
      size: the number of examples, below 2**62.
      place: int, or uint64 array [...], below `size`.
      stream: name of the kind of draw.

    Returns:
      Indices of examples, like `place`.
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
    """Hashes 64 bits, an int or a uint64 array, by the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


def stream_key(seed: int, step: "jax.Array | int", stream: str) -> "jax.Array":
    """Returns the JAX random key of a named stream at a step."""
    import jax  # imported here, since worker processes of the data run without JAX

    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), zlib.crc32(stream.encode()))
