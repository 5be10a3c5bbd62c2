"""Numbers of examples: 64 bits on the host; on devices, which count in 32, two words where a data set needs them."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import jax

LARGEST = 2**31 - 1  # of a number that is one word


def words(ids: np.ndarray) -> np.ndarray:
    """Returns int32 [B, 2], the upper and the lower 32 bits, of int64 [B]; negative numbers have a negative upper word.
    """
    return np.stack([ids >> 32, ids & 0xFFFFFFFF], -1).astype(np.uint32).view(np.int32)


def whole(ids: Any) -> np.ndarray:
    """Returns the numbers, [B] on the host, of what a batch has as `id`: int32 [B], or [B, 2]."""
    ids = np.asarray(ids)
    return ids if ids.ndim == 1 else ids[:, 0].astype(np.int64) << 32 | ids[:, 1].view(np.uint32).astype(np.int64)


def same(ids: "jax.Array") -> "jax.Array":
    """Returns bool [B, B]: which rows show the same example, of int32 [B] or [B, 2]."""
    equal = ids[:, None] == ids[None]
    return equal if ids.ndim == 1 else equal.all(-1)
