"""Spherical k-means and balanced clusters of points that do not fit into memory.

Points are float32 [n, D] of length 1. They come as a function that yields chunks of any size, always in the same order,
and is called once per pass. Only the centroids and one number per cluster are kept between passes.
"""

from collections.abc import Callable, Iterator
from logging import getLogger

import jax
import jax.numpy as jnp
import numpy as np

Chunks = Callable[[], Iterator[np.ndarray]]
CHUNK = 16_384  # points per call to the device; chunks are padded to a multiple of PAD
PAD = 1024
PER_CLUSTER = 128  # points per cluster in the sample for initialization
ITERATIONS = 50  # upper bound for k-means
SIMILARITY_TOLERANCE = 1e-5  # k-means stops when the mean similarity grows by less
EPSILON = 0.05  # entropy weight in Sinkhorn's iterations (SwAV, arXiv 2006.09882)
SINKHORN = 3  # number of Sinkhorn iterations (SwAV)
ROUNDS = 3  # times that centroids are recomputed from balanced clusters
PASSES = 300  # most passes over the points to balance hard counts
FASTER, SLOWER = 1.2, 0.5  # factors of a price's step while its error keeps its sign, and when the sign changes
log = getLogger(__name__)


@jax.jit
def _assigned(points: jax.Array, centroids: jax.Array, prices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the centroid with the highest similarity minus price per point, int32 [n], and the similarity [n]."""
    similar = jnp.matmul(points, centroids.T, precision="highest")
    chosen = (similar - prices).argmax(1).astype(jnp.int32)
    return chosen, jnp.take_along_axis(similar, chosen[:, None], 1)[:, 0]


@jax.jit
def _soft_counts(points: jax.Array, valid: jax.Array, centroids: jax.Array, potentials: jax.Array) -> jax.Array:
    """Returns the sum of the points' soft assignments (a softmax over centroids), float32 [m]."""
    similar = jnp.matmul(points, centroids.T, precision="highest")
    return valid @ jax.nn.softmax(similar / EPSILON + potentials, 1)


@jax.jit
def _sums(points: jax.Array, valid: jax.Array, chosen: jax.Array, like: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(points * valid[:, None], chosen, len(like))


def _padded(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pads points [n, D] with zeros to a multiple of PAD rows; returns them and float32 [n'], 1 for points."""
    extra, valid = -len(points) % PAD, np.ones(len(points), np.float32)
    return (np.pad(points, ((0, extra), (0, 0))), np.pad(valid, (0, extra))) if extra else (points, valid)


def unit(points: np.ndarray) -> np.ndarray:
    """Returns points [n, D] scaled to length 1, on the host."""
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def kmeans_pp_init(sample: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Draws initial centroids float32 [clusters, D] from a sample [k, D] by k-means++ (Arthur and Vassilvitskii 2007).

    The squared distance of two points of length 1 is 2 - 2 cos.
    """
    chosen = [int(rng.integers(len(sample)))]
    nearest = np.full(len(sample), np.inf)
    for _ in range(1, clusters):
        nearest = np.minimum(nearest, np.maximum(2 - 2 * sample @ sample[chosen[-1]], 0))
        nearest[chosen] = 0
        total = nearest.sum()
        if total > 0:
            chosen.append(int(np.searchsorted(np.cumsum(nearest), rng.random() * total, side="right")))
        else:  # fewer distinct points than clusters
            chosen.append(int(rng.integers(len(sample))))
    return sample[chosen].astype(np.float32)


def kmeans(chunks: Chunks, centroids: np.ndarray, iterations: int = ITERATIONS) -> tuple[np.ndarray, float]:
    """Runs spherical k-means (Dhillon and Modha 2001): centroids are means scaled to length 1.

    Centroids that lose all their points move to the points that are least similar to their own centroids.

    Args:
      chunks: yields the points.
      centroids: initial centroids float32 [m, D] of length 1.
      iterations: upper bound; it stops earlier when the mean similarity grows by less than SIMILARITY_TOLERANCE.

    Returns:
      Centroids float32 [m, D], and the mean similarity of points to their centroids.
    """
    before = -np.inf
    for number in range(iterations):
        sums, counts = np.zeros_like(centroids, np.float64), np.zeros(len(centroids), np.int64)
        similarity, far = 0.0, [(np.inf, np.zeros(centroids.shape[1], np.float32))]
        for chunk in chunks():
            points, valid = _padded(chunk)
            chosen, similar = _assigned(points, centroids, np.zeros(len(centroids), np.float32))
            sums += np.asarray(_sums(points, valid, chosen, centroids), np.float64)
            chosen, similar = np.asarray(chosen)[: len(chunk)], np.asarray(similar)[: len(chunk)]
            counts += np.bincount(chosen, minlength=len(centroids))
            similarity += float(similar.sum(dtype=np.float64))
            worst = np.argsort(similar, kind="stable")[: len(centroids)]
            far = sorted([*far, *((float(similar[i]), chunk[i].copy()) for i in worst)], key=lambda item: item[0])
            far = far[: len(centroids)]  # copies: views would keep their chunks in memory
        mean = similarity / counts.sum()
        if mean - before < SIMILARITY_TOLERANCE:
            break
        before = mean
        empty = np.flatnonzero(counts == 0)
        for place, (_, point) in zip(empty, far, strict=False):
            sums[place] = point
        centroids = unit(sums).astype(np.float32)
        log.debug("k-means pass %d: mean similarity %.5f, %d empty", number, mean, len(empty))
    return centroids, mean


def assign(chunks: Chunks, centroids: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cluster of each point, int32 [n], and its similarity to the cluster's centroid, float32 [n].

    Args:
      chunks: yields the points.
      centroids: float32 [m, D].
      prices: float32 [m], subtracted from the similarities; see `balance`.
    """
    parts = []
    for chunk in chunks():
        chosen, similar = jax.device_get(_assigned(_padded(chunk)[0], centroids, prices))
        parts.append((chosen[: len(chunk)], similar[: len(chunk)]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def balanced_kmeans(chunks: Chunks, sample: np.ndarray, clusters: int, ratio: float,
                    rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Clusters points into clusters of nearly equal size.

    Each stage runs on the sample in memory first, so that few passes over all points remain.

    Args:
      chunks: yields the points.
      sample: float32 [k, D], PER_CLUSTER points per cluster, or all points if there are fewer.
      clusters: number of clusters m.
      ratio: see `balance`.
      rng: draws the initial centroids.

    Returns:
      Centroids float32 [m, D], prices float32 [m], and the mean similarity that k-means reached before balancing.
    """
    def sampled() -> Iterator[np.ndarray]:
        yield from (sample[start : start + CHUNK] for start in range(0, len(sample), CHUNK))

    centroids, _ = kmeans(sampled, kmeans_pp_init(sample, clusters, rng))
    centroids, similarity = kmeans(chunks, centroids)
    return *balanced(chunks, sampled, centroids, ratio), similarity


def balanced(chunks: Chunks, sampled: Chunks, centroids: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Balances clusters, alternating ROUNDS times between prices and centroids; returns centroids and prices.

    Args:
      chunks: yields the points.
      sampled: yields a sample, which is balanced before all points are.
      centroids: float32 [m, D] from k-means.
      ratio: see `balance`.
    """
    prices = balance(chunks, centroids, ratio, balance(sampled, centroids, ratio))
    for _ in range(ROUNDS):
        sums = np.zeros_like(centroids, np.float64)
        for chunk in chunks():
            points, valid = _padded(chunk)
            sums += np.asarray(_sums(points, valid, _assigned(points, centroids, prices)[0], centroids), np.float64)
        gone = np.linalg.norm(sums, axis=1) < 1e-6  # no points, or points that cancel out
        centroids = np.where(gone[:, None], centroids, unit(sums)).astype(np.float32)
        prices = balance(chunks, centroids, ratio, balance(sampled, centroids, ratio, prices))
    return centroids, prices


def size_ratio(counts: np.ndarray) -> float:
    """Returns the size of the largest cluster over that of the smallest; at least 1e9 if a cluster is empty."""
    return float(counts.max() / max(counts.min(), 1e-9))


def balance(chunks: Chunks, centroids: np.ndarray, ratio: float, prices: np.ndarray | None = None) -> np.ndarray:
    """Returns prices float32 [m] with which the largest cluster has at most `ratio` times the points of the smallest.

    A point belongs to the centroid with the highest similarity minus price. Without given `prices`, they start as the
    potentials of an entropic optimal transport with equal shares (Sinkhorn), which balances soft assignments only. Each
    pass then counts hard assignments and moves the price of each cluster against its error in size. Steps grow while
    the error keeps its sign and shrink when the sign changes. If PASSES are not enough (equal points can make the goal
    impossible), the prices of the best pass are returned.
    """
    prices = _sinkhorn(chunks, centroids) if prices is None else prices
    steps, signs = np.full(len(centroids), EPSILON / 10), np.zeros(len(centroids))
    best = (np.inf, prices)
    for _ in range(PASSES):
        counts = np.zeros(len(centroids), np.int64)
        for chunk in chunks():
            chosen = np.asarray(_assigned(_padded(chunk)[0], centroids, prices)[0])[: len(chunk)]
            counts += np.bincount(chosen, minlength=len(centroids))
        best = min(best, (size_ratio(counts), prices), key=lambda item: item[0])
        if size_ratio(counts) <= ratio:
            break
        off = np.log(np.maximum(counts, 0.5) / counts.mean())
        turned = np.sign(off) != signs
        steps = np.where(turned, steps * SLOWER, steps * FASTER)
        signs = np.sign(off)
        prices = (prices + steps * np.clip(off, -1, 1)).astype(np.float32)
    return best[1]


def _sinkhorn(chunks: Chunks, centroids: np.ndarray) -> np.ndarray:
    """Returns prices float32 [m] with which soft assignments give all centroids nearly the same share of the points."""
    potentials = np.zeros(len(centroids), np.float32)
    for _ in range(SINKHORN):
        counts = sum(np.asarray(_soft_counts(*_padded(chunk), centroids, potentials), np.float64) for chunk in chunks())
        potentials = (potentials + np.log(counts.mean() / np.maximum(counts, 1e-6))).astype(np.float32)
    return -EPSILON * (potentials - potentials.mean())
