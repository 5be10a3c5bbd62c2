"""Sampled examples and content hashes that identify a split independently of its path."""

import hashlib
from collections.abc import Iterable

import numpy as np

SAMPLES = 64  # examples of a split whose content identifies it


def sampled(size: int) -> np.ndarray:
    """Returns up to 64 evenly spaced indices from 0 to size - 1, ascending, int64 [min(64, size)]."""
    return np.unique(np.linspace(0, size - 1, SAMPLES).round().astype(np.int64)) if size else np.zeros(0, np.int64)


def short_hash(parts: Iterable[bytes]) -> str:
    """Returns 16 hexadecimal digits of the SHA-256 of byte strings, each hashed with its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]
