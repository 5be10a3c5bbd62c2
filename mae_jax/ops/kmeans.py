"""k-means of points in host memory; distances are computed on the first device."""

import jax
import jax.numpy as jnp
import numpy as np

ITERATIONS = 20  # as in the public recipe for a vocabulary of patches, CCViT
CHUNK = 4096  # points per call to the device


def kmeans(points: np.ndarray, clusters: int, rng: np.random.Generator, iterations: int = ITERATIONS) -> np.ndarray:
    """Runs Lloyd's algorithm from randomly chosen points.

    Centers that lose all their points move to the points that are farthest from their own centers.

    Args:
      points: float32 [n, D], n at least `clusters`.
      clusters: number of centers.
      rng: draws the initial centers.
      iterations: upper bound; the algorithm stops earlier when no point changes its center.

    Returns:
      Centers float32 [clusters, D].
    """
    centers = points[np.sort(rng.choice(len(points), clusters, replace=False))].astype(np.float32)
    before = None
    for _ in range(iterations):
        nearest, distances = assign(points, centers)
        if before is not None and np.array_equal(nearest, before):
            break
        before = nearest
        counts = np.bincount(nearest, minlength=clusters)
        centers = _sums(points, nearest, clusters) / np.maximum(counts, 1).astype(np.float32)[:, None]
        empty = np.flatnonzero(counts == 0)
        centers[empty] = points[np.argsort(-distances, kind="stable")[: len(empty)]]
    return centers


def assign(points: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index of the center nearest to each point, int32 [n], and its squared distance, float32 [n]."""
    padded = np.concatenate([points, np.zeros((-len(points) % CHUNK, points.shape[1]), points.dtype)])
    parts = [jax.device_get(_nearest(part, centers)) for part in padded.reshape(-1, CHUNK, points.shape[1])]
    nearest, distances = (np.concatenate(column)[: len(points)] for column in zip(*parts, strict=True))
    return nearest, distances


@jax.jit
def _nearest(points: jax.Array, centers: jax.Array) -> tuple[jax.Array, jax.Array]:
    products = jnp.matmul(points, centers.T, precision="highest")
    distances = jnp.square(centers).sum(1) - 2 * products
    nearest = distances.argmin(1).astype(jnp.int32)
    return nearest, jnp.maximum(distances.min(1) + jnp.square(points).sum(1), 0)


def _sums(points: np.ndarray, nearest: np.ndarray, clusters: int) -> np.ndarray:
    """Returns the sum of the points of each center, float32 [clusters, D]."""
    order = np.argsort(nearest, kind="stable")
    starts = np.searchsorted(nearest[order], np.arange(clusters))
    filled = np.flatnonzero(np.bincount(nearest, minlength=clusters))
    sums = np.zeros((clusters, points.shape[1]), np.float32)
    sums[filled] = np.add.reduceat(points[order], starts[filled], axis=0)
    return sums
