"""Spherical k-means, and balanced clusters, of more points than memory holds: they are read anew in every pass.

Points are float32 [n, D] of length 1, in chunks of any size: a function that yields them, always in the same order.
What stays between passes is one number per cluster, and the centroids.
"""

from collections.abc import Callable, Iterator
from logging import getLogger

import jax
import jax.numpy as jnp
import numpy as np

Chunks = Callable[[], Iterator[np.ndarray]]
CHUNK = 16_384  # points that are compared with all centroids at a time; smaller chunks are padded to a multiple of PAD
PAD = 1024
PER_CLUSTER = 128  # points of the sample that clusters begin with, for each cluster
ITERATIONS = 50  # of k-means, at most
SIMILARITY_TOLERANCE = 1e-5  # of the mean similarity, below which k-means ends
EPSILON = 0.05  # of the entropy in Sinkhorn's iterations, three of them (SwAV, arXiv 2006.09882)
SINKHORN = 3
ROUNDS = 3  # of centroids that follow balanced clusters
PASSES = 300  # over the points, at most, to balance hard counts
FASTER, SLOWER = 1.2, 0.5  # of a price's step while its cluster stays too large or too small, and when it turns
log = getLogger(__name__)


@jax.jit
def _assigned(points: jax.Array, centroids: jax.Array, prices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the centroid of each point's highest similarity less price, int32 [n], and the similarity [n]."""
    similar = jnp.matmul(points, centroids.T, precision="highest")
    chosen = (similar - prices).argmax(1).astype(jnp.int32)
    return chosen, jnp.take_along_axis(similar, chosen[:, None], 1)[:, 0]


@jax.jit
def _soft_counts(points: jax.Array, valid: jax.Array, centroids: jax.Array, potentials: jax.Array) -> jax.Array:
    """Returns how many points each centroid has if each is shared by a softmax, float32 [m]."""
    similar = jnp.matmul(points, centroids.T, precision="highest")
    return valid @ jax.nn.softmax(similar / EPSILON + potentials, 1)


@jax.jit
def _sums(points: jax.Array, valid: jax.Array, chosen: jax.Array, like: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(points * valid[:, None], chosen, len(like))


def _padded(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the points with rows of zeros up to a multiple of PAD, and which are points."""
    extra, valid = -len(points) % PAD, np.ones(len(points), np.float32)
    return (np.pad(points, ((0, extra), (0, 0))), np.pad(valid, (0, extra))) if extra else (points, valid)


def unit(points: np.ndarray) -> np.ndarray:
    """Returns points [n, D] scaled to length 1."""
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def kmeans_pp_init(sample: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the first centroids, [clusters, D]: points of a sample that are far apart, drawn as k-means++ does.

    (Arthur and Vassilvitskii 2007; squared distances of points of length 1 are 2 - 2 cos.)
    """
    chosen = [int(rng.integers(len(sample)))]
    nearest = np.full(len(sample), np.inf)
    for _ in range(1, clusters):
        nearest = np.minimum(nearest, np.maximum(2 - 2 * sample @ sample[chosen[-1]], 0))
        nearest[chosen] = 0
        total = nearest.sum()
        if total > 0:
            chosen.append(int(np.searchsorted(np.cumsum(nearest), rng.random() * total, side="right")))
        else:  # fewer different points than clusters
            chosen.append(int(rng.integers(len(sample))))
    return sample[chosen].astype(np.float32)


def kmeans(chunks: Chunks, centroids: np.ndarray, iterations: int = ITERATIONS) -> tuple[np.ndarray, float]:
    """Runs spherical k-means (Dhillon and Modha 2001): centroids are means scaled to length 1.

    A centroid without points moves to the point that is least like its own; several, to several.

    Args:
      chunks: the points.
      centroids: float32 [m, D] of length 1, from which it starts.
      iterations: at most; it ends when the mean similarity grows by less than SIMILARITY_TOLERANCE.

    Returns:
      The centroids and the mean similarity of points to the nearest one.
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
            far = far[: len(centroids)]  # copies, since rows would keep their chunks
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
    """Returns each point's cluster, int32 [n], and its similarity to that centroid, float32 [n]."""
    parts = []
    for chunk in chunks():
        chosen, similar = jax.device_get(_assigned(_padded(chunk)[0], centroids, prices))
        parts.append((chosen[: len(chunk)], similar[: len(chunk)]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def balanced_kmeans(chunks: Chunks, sample: np.ndarray, clusters: int, ratio: float,
                    rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Clusters points into groups of nearly one size.

    What takes many passes is done on the sample first, which is in memory; few passes over all points remain.

    Args:
      chunks: the points.
      sample: some of them, float32 [k, D], PER_CLUSTER times as many as clusters or all.
      clusters: m.
      ratio: see `balance`.
      rng: of the first centroids.

    Returns:
      Centroids float32 [m, D], prices float32 [m], and the mean similarity that k-means reached before balancing.
    """
    def sampled() -> Iterator[np.ndarray]:
        yield from (sample[start : start + CHUNK] for start in range(0, len(sample), CHUNK))

    centroids, _ = kmeans(sampled, kmeans_pp_init(sample, clusters, rng))
    centroids, similarity = kmeans(chunks, centroids)
    return *balanced(chunks, sampled, centroids, ratio), similarity


def balanced(chunks: Chunks, sampled: Chunks, centroids: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns centroids and prices of clusters of nearly one size: each follows the other a few times.

    Args:
      chunks: the points.
      sampled: some of them, which are balanced first each time.
      centroids: float32 [m, D] of k-means.
      ratio: see `balance`.
    """
    prices = balance(chunks, centroids, ratio, balance(sampled, centroids, ratio))
    for _ in range(ROUNDS):
        sums = np.zeros_like(centroids, np.float64)
        for chunk in chunks():
            points, valid = _padded(chunk)
            sums += np.asarray(_sums(points, valid, _assigned(points, centroids, prices)[0], centroids), np.float64)
        gone = np.linalg.norm(sums, axis=1) < 1e-6  # without points, or with such as cancel out
        centroids = np.where(gone[:, None], centroids, unit(sums)).astype(np.float32)
        prices = balance(chunks, centroids, ratio, balance(sampled, centroids, ratio, prices))
    return centroids, prices


def size_ratio(counts: np.ndarray) -> float:
    """Returns the points of the largest cluster over those of the smallest; a huge number where one is empty."""
    return float(counts.max() / max(counts.min(), 1e-9))


def balance(chunks: Chunks, centroids: np.ndarray, ratio: float, prices: np.ndarray | None = None) -> np.ndarray:
    """Returns prices float32 [m] by which the largest cluster has at most `ratio` times the points of the smallest.

    Points belong to the centroid of the highest similarity less price. Prices start as those given, or else as the
    potentials of an entropic optimal transport with equal shares, which balance soft shares, not hard counts. So each
    price then follows the hard count of its own cluster in each pass, in steps that grow while the sign stays and
    shrink when it turns. Where PASSES do not suffice, as where points are equal, those of the best pass are returned.
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
    """Returns prices float32 [m] under which a softmax gives all centroids the same share of the points."""
    potentials = np.zeros(len(centroids), np.float32)
    for _ in range(SINKHORN):
        counts = sum(np.asarray(_soft_counts(*_padded(chunk), centroids, potentials), np.float64) for chunk in chunks())
        potentials = (potentials + np.log(counts.mean() / np.maximum(counts, 1e-6))).astype(np.float32)
    return -EPSILON * (potentials - potentials.mean())
