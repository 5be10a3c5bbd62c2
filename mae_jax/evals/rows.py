"""Rows of batches, collected on the host."""

import jax
import numpy as np
from jax.sharding import Mesh

from mae_jax.sharding import replicated


class Rows:
    """Collects rows of global arrays on every host, those that are wanted."""

    def __init__(self, mesh: Mesh):
        self.sharding, self.parts = replicated(mesh), []

    def add(self, keep: jax.Array, *arrays: jax.Array) -> None:
        """Adds the rows of arrays [B, ...] where keep, bool [B], is true."""
        keep, *rows = jax.device_get(jax.device_put((keep, *arrays), self.sharding))
        self.parts.append([x[keep] for x in rows])

    def take(self) -> list[np.ndarray]:
        """Returns the arrays that were added, row by row."""
        return [np.concatenate(column) for column in zip(*self.parts, strict=True)]
