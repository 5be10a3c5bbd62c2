"""Accumulators on the host: means of (sum, weight) metrics, sums of counts, and rows of sharded arrays."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mae_jax.runtime.sharding import replicated


class HostRows:
    """Collects selected rows of global arrays on every host."""

    def __init__(self, mesh: Mesh):
        self.sharding, self.parts = replicated(mesh), []

    def add(self, keep: jax.Array, *arrays: jax.Array) -> None:
        """Adds the rows of arrays [B, ...] where keep, bool [B], is true."""
        self.parts.append(self.whole(keep, *arrays))

    def whole(self, keep: jax.Array, *arrays: jax.Array) -> list[np.ndarray]:
        """Returns these rows, the same NumPy arrays on every host, without adding them."""
        keep, *rows = jax.device_get(jax.device_put((keep, *arrays), self.sharding))
        return [x[keep] for x in rows]

    def collect(self) -> list[np.ndarray]:
        """Returns the added arrays, concatenated along the rows."""
        return [np.concatenate(column) for column in zip(*self.parts, strict=True)]


class Means:
    """Accumulates metrics name → (sum, weight) and returns their means."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, metrics: dict[str, tuple[Any, Any]]) -> None:
        for name, (total, weight) in metrics.items():
            old_total, old_weight = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (old_total + float(total), old_weight + float(weight))

    def pop(self, prefix: str = "") -> dict[str, float]:
        """Returns prefix + name → mean, NaN for a metric of weight 0, and resets the sums."""
        out = {prefix + name: total / weight if weight else float("nan") for name, (total, weight) in self.sums.items()}
        self.sums = {}
        return out


def add(total: dict[str, np.ndarray], part: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the int64 sums of `total`, {} before the first batch, and of the counts `part` of one more batch."""
    return {name: total.get(name, 0) + np.asarray(count, np.int64) for name, count in part.items()}
