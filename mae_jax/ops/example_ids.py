"""Example ids: int64 on the host; on devices, which have 32-bit integers, one word or two."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import jax

LARGEST = 2**31 - 1  # largest id that fits one word


def words(ids: np.ndarray) -> np.ndarray:
    """Splits ids int64 [B] into upper and lower words, int32 [B, 2]; negative ids have a negative upper word."""
    return np.stack([ids >> 32, ids & 0xFFFFFFFF], -1).astype(np.uint32).view(np.int32)


def whole(ids: Any) -> np.ndarray:
    """Returns the ids [B] on the host for a batch's field `id`, int32 [B] or [B, 2]."""
    ids = np.asarray(ids)
    return ids if ids.ndim == 1 else ids[:, 0].astype(np.int64) << 32 | ids[:, 1].view(np.uint32).astype(np.int64)


def same(ids: "jax.Array") -> "jax.Array":
    """Returns which rows hold the same example, bool [B, B], for ids int32 [B] or [B, 2]."""
    equal = ids[:, None] == ids[None]
    return equal if ids.ndim == 1 else equal.all(-1)
