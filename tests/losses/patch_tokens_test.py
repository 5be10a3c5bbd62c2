"""Vocabularies of patches beside plain NumPy and scikit-learn."""

import numpy as np
import pytest
from sklearn.cluster import KMeans

from mae_jax.errors import UserError
from mae_jax.losses import patch_tokens
from mae_jax.methods import patch_vocabulary
from mae_jax.ops import kmeans
from mae_jax.ops.patches import MEAN, STD


def patches(count=600, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, 48)).cumsum(-1) * 5 + rng.normal(size=(count, 1)) * 25 + 128).clip(
        0, 255).astype(np.uint8)


def normal(some):
    return (((some.reshape(*some.shape[:-1], -1, 3) / 255) - MEAN) / STD).reshape(some.shape)


def cosines(x, y):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (y / np.linalg.norm(y, axis=1, keepdims=True)).T


def test_k_means_is_scikit_learns_from_the_same_start():
    points = normal(patches()).astype(np.float32)
    start = points[np.sort(np.random.default_rng(5).choice(len(points), 12, replace=False))]
    ours = kmeans.kmeans(points, 12, np.random.default_rng(5), iterations=20)
    theirs = KMeans(12, init=start, n_init=1, max_iter=20, tol=0, algorithm="lloyd").fit(points)
    np.testing.assert_allclose(ours, theirs.cluster_centers_, atol=1e-3)


def test_a_center_that_lost_its_points_moves_to_the_farthest_one():
    points = np.float32([[0], [0], [0], [0], [10], [11]])
    centers = kmeans.kmeans(points, 3, np.random.default_rng(0))  # some start has equal centers
    nearest, distances = kmeans.assign(points, centers)
    assert len(np.unique(nearest)) == 3
    assert distances.sum() == pytest.approx(0)


@pytest.mark.parametrize("kind", patch_tokens.KINDS)
def test_a_patch_gets_the_nearest_entry(kind):
    some = patches()
    vocabulary = patch_vocabulary.build(some, kind, 20, np.random.default_rng(1))
    assert vocabulary.shape == (19, 48)
    x = normal(some)
    if kind == "projection":
        channels = x.reshape(len(x), -1, 3)
        x = (channels - channels.mean(1, keepdims=True)).reshape(x.shape)
    scores = -np.square(x[:, None] - vocabulary).sum(2) if kind == "kmeans" else cosines(x, vocabulary)
    found, ranked = np.asarray(patch_tokens.tokenize(some, vocabulary, kind)), np.sort(scores, 1)
    clear = ranked[:, -1] - ranked[:, -2] > 1e-4
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(found[clear], 1 + scores.argmax(1)[clear])


def test_the_entries_of_random_patches_are_patches_of_the_sample_each_its_own_token():
    some = patches()
    vocabulary = patch_vocabulary.build(some, "patches", 20, np.random.default_rng(1))
    same = np.abs(vocabulary[:, None] - normal(some)).max(2) < 1e-4
    assert (same.sum(1) == 1).all()
    chosen = some[same.argmax(1)]
    np.testing.assert_array_equal(patch_tokens.tokenize(chosen, vocabulary, "patches"), np.arange(1, 20))


def test_constant_patches_have_the_token_0_and_no_other_patch_has():
    some = patches()
    some[:3] = np.tile([10, 200, 30], 16)
    entries = patch_vocabulary.build(some, "kmeans", 20, np.random.default_rng(1))
    found = np.asarray(patch_tokens.tokenize(some, entries, "kmeans"))
    assert (found[:3] == 0).all()
    assert (found[3:] > 0).all()


def test_perplexity_is_that_of_the_tokens_that_are_not_constant():
    assert patch_vocabulary.perplexity(np.array([1, 2, 3, 4, 0, 0, 0, 0, 0])) == pytest.approx(4)
    assert patch_vocabulary.perplexity(np.array([7, 7, 7])) == pytest.approx(1)


def test_a_vocabulary_that_is_too_large_or_hardly_used_is_refused_with_the_figures():
    with pytest.raises(UserError, match=r"vocabulary=200 .* 600 .* 120"):
        patch_vocabulary.build(patches(), "kmeans", 200, np.random.default_rng(0))
    for few in (patches()[:14], patches()[:0], np.full((100, 48), 7, np.uint8)):
        with pytest.raises(UserError, match=r"only (14|0) "):
            patch_vocabulary.build(few, "kmeans", 3, np.random.default_rng(0))
    alike = patches(1)[[0] * 600]
    alike[:, 0] = np.arange(600) % 2
    with pytest.raises(UserError, match=r"600 .*2\.0 tokens.*method\.vocabulary=100"):
        patch_vocabulary.build(alike, "patches", 100, np.random.default_rng(0))
