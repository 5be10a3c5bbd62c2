"""Synthetic features of classes that overlap; for the tests of probes."""

import numpy as np

CLASSES = 4


def blobs(count: int, seed: int, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Returns overlapping classes (features [count, width], labels): no classifier is perfect."""
    centers = np.random.default_rng(99).normal(size=(CLASSES, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=count)
    return (centers[labels] + 1.5 * rng.normal(size=(count, width))).astype(np.float32), labels.astype(np.int32)
