import weakref

import numpy as np
import pytest
from sklearn.cluster import KMeans

from mae_jax.ops import spherical_kmeans


def uneven(count=600, width=12, seed=0):
    """Points in bunches of very different sizes, on the sphere."""
    draws = np.random.default_rng(seed)
    middles = draws.normal(size=(10, width))
    bunch = draws.choice(10, count, p=np.array([40, 20, 10, 8, 6, 5, 4, 3, 2, 2]) / 100)
    return spherical_kmeans.unit(middles[bunch] + 0.6 * draws.normal(size=(count, width))).astype(np.float32)


def chunked(points, size):
    return lambda: (points[i : i + size] for i in range(0, len(points), size))


def inertia(points, centroids):
    return float(((points - centroids[(points @ centroids.T).argmax(1)]) ** 2).sum())


@pytest.mark.parametrize("clusters", [4, 16])
def test_kmeans_is_as_tight_as_that_of_scikit_learn_from_the_same_start(clusters):
    points = uneven()
    start = spherical_kmeans.kmeans_pp_init(points, clusters, np.random.default_rng(1))
    ours, mean = spherical_kmeans.kmeans(chunked(points, 100), start)
    theirs = KMeans(clusters, init=start, n_init=1, tol=0, max_iter=300).fit(points)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-5)
    assert mean == pytest.approx((points @ ours.T).max(1).mean(), rel=1e-5)
    # Theirs are means that are not scaled to length 1: of the same clusters, they are a little tighter.
    assert inertia(points, ours) <= 1.01 * inertia(points, spherical_kmeans.unit(theirs.cluster_centers_))


def test_the_size_of_chunks_changes_nothing():
    points = uneven()
    start = spherical_kmeans.kmeans_pp_init(points, 8, np.random.default_rng(1))
    runs = [spherical_kmeans.kmeans(chunked(points, size), start)[0] for size in (600, 77)]
    np.testing.assert_allclose(*runs, atol=1e-5)


def test_chunks_of_a_pass_do_not_stay_in_memory():
    points, alive = uneven(13 * spherical_kmeans.PAD), []

    def chunks():
        for start in range(0, len(points), spherical_kmeans.PAD):
            chunk = points[start : start + spherical_kmeans.PAD].copy()
            alive.append(weakref.ref(chunk))
            yield chunk
            del chunk
            assert sum(reference() is not None for reference in alive) <= 2

    spherical_kmeans.kmeans(chunks, points[:8], iterations=3)
    assert len(alive) > 12


def test_the_first_centroids_are_different_points_and_the_same_for_a_seed():
    points = uneven()
    first, again, other = (
        spherical_kmeans.kmeans_pp_init(points, 40, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(np.unique(first, axis=0)) == 40
    assert spherical_kmeans.kmeans_pp_init(np.ones((5, 3), np.float32), 4, np.random.default_rng(0)).shape == (4, 3)


def test_a_centroid_without_points_takes_one():
    points = uneven()
    start = np.concatenate([points[:3], -points[:1] * 0 - 1]).astype(np.float32)
    start[3] = -points.mean(0) / np.linalg.norm(points.mean(0))
    centroids, _ = spherical_kmeans.kmeans(chunked(points, 100), start)
    assert np.bincount((points @ centroids.T).argmax(1), minlength=4).min() > 0


@pytest.mark.parametrize(("count", "clusters"), [(480, 16), (1920, 64)])
def test_balanced_clusters_are_of_nearly_one_size_and_nearly_as_tight(count, clusters):
    points = uneven(count)  # 30 points to a cluster
    chunks = chunked(points, 256)
    first = spherical_kmeans.kmeans_pp_init(points, clusters, np.random.default_rng(0))
    plain, mean = spherical_kmeans.kmeans(chunks, first)
    loose = np.bincount(spherical_kmeans.assign(chunks, plain, np.zeros(clusters, np.float32))[0], minlength=clusters)
    centroids, prices = spherical_kmeans.balanced(chunks, chunks, plain, 3.0)
    chosen, similar = spherical_kmeans.assign(chunks, centroids, prices)
    sizes = np.bincount(chosen, minlength=clusters)
    assert sizes.min() > 0
    assert sizes.max() / sizes.min() <= 3 < loose.max() / max(loose.min(), 1)
    assert similar.mean() >= 0.95 * mean
    fewer = points[np.random.default_rng(1).permutation(count)[: count // 2]]
    centers, fees, close = spherical_kmeans.balanced_kmeans(chunks, fewer, clusters, 3.0, np.random.default_rng(0))
    own, near = spherical_kmeans.assign(chunks, centers, fees)
    assert np.bincount(own, minlength=clusters).max() / np.bincount(own, minlength=clusters).min() <= 3
    assert close == pytest.approx(mean, rel=0.03)
    assert near.mean() >= 0.95 * close
    again = spherical_kmeans.balanced(chunks, chunks, plain, 3.0)
    np.testing.assert_array_equal(again[0], centroids)
    np.testing.assert_array_equal(again[1], prices)


def test_a_cluster_that_loses_its_points_keeps_its_centroid():
    points = np.tile(np.eye(2, 3, dtype=np.float32), (20, 1))  # two points, many times: a third cluster stays empty
    start = np.concatenate([np.eye(2, 3), [[0, 0, -1]]]).astype(np.float32)
    centroids, prices = spherical_kmeans.balanced(chunked(points, 8), chunked(points, 8), start, 3.0)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-6)
    chosen, _ = spherical_kmeans.assign(chunked(points, 8), centroids, prices)
    assert spherical_kmeans.size_ratio(np.bincount(chosen, minlength=3)) > 3
