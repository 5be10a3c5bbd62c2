"""Features of whole splits, on disk in chunks: computed once, resumed after an interruption, read in several passes.

An unreadable image has the features of a gray one. They only decide its own cluster.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mae_jax.inference import forward
from mae_jax.inference.chunks import Chunks, Columns
from mae_jax.methods.base import Method, pool
from mae_jax.ops import spherical_kmeans
from mae_jax.ops.example_ids import whole as whole_ids
from mae_jax.runtime.progress import Tell
from mae_jax.runtime.sharding import replicated


class Features(Chunks):
    """The features of one split: columns `features` float32 [n, D], `ids` int [n] and `valid` bool [n]."""

    def compute(self, method: Method, params: Any, extras: Any, batches: Iterator[dict[str, np.ndarray]],
                mesh: Mesh, tell: Tell) -> None:
        """Computes the features of the missing chunks and writes them.

        Args:
          method, params, extras: the encoder.
          batches: all batches of the split, this process's rows, preprocessed as for evaluation.
          mesh: the devices over which a batch is sharded.
          tell: called with the number of images that were added.
        """
        size = method.config.batch_size
        params, extras = forward.placed((params, extras), mesh)
        self.rows = max(1, spherical_kmeans.CHUNK // size) * size
        encode = jax.jit(lambda params, extras, batch: (
            pool(method.encode(params, extras, batch), method.config.model.pool), batch["id"], batch["valid"] > 0),
            out_shardings=replicated(mesh))

        def rest(done: int) -> Iterator[Columns]:
            left, known = itertools.islice(batches, done // size, None), done % size
            for values, ids, valid in forward.outputs(encode, params, extras, left, mesh, size):
                ids = whole_ids(ids)
                there = (ids >= 0) & (np.arange(len(ids)) >= known)
                known = 0
                yield {"features": values[there].astype(np.float32), "ids": ids[there], "valid": valid[there]}
                tell(int(there.sum()))

        self.fill(rest)

    def chunks(self, readable: bool = True) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (features float32 [n, D], ids int [n]) of the readable images, or of all; raises UserError."""
        for columns in self.read():
            keep = columns["valid"] if readable else np.ones(len(columns["ids"]), bool)
            yield columns["features"][keep], columns["ids"][keep]

    def mean(self) -> np.ndarray:
        """Returns the mean feature of the readable images, float32 [D]."""
        total, count = 0.0, 0
        for values, _ in self.chunks():
            total, count = total + values.sum(0, dtype=np.float64), count + len(values)
        return (total / count).astype(np.float32)

    def points(self, mean: np.ndarray, readable: bool = True) -> Iterator[np.ndarray]:
        """Yields chunks of centered features at unit length, float32 [n, D].

        Args:
          mean: float32 [D], subtracted.
          readable: leave unreadable images out.
        """
        for values, _ in self.chunks(readable):
            yield spherical_kmeans.unit(values - mean).astype(np.float32)

    def sample(self, count: int, mean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns at most `count` points, a uniform sample of all readable images, float32 [n, D]."""
        kept = np.zeros((0, len(mean)), np.float32)
        draws = np.zeros(0)
        for chunk in self.points(mean):
            draws = np.concatenate([draws, rng.random(len(chunk))])
            kept = np.concatenate([kept, chunk])
            lowest = np.sort(np.argsort(draws, kind="stable")[:count])
            draws, kept = draws[lowest], kept[lowest]
        return kept
