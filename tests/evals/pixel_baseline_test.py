"""The components that the linear probe of pixels gets, against scikit-learn's PCA."""

import numpy as np
from sklearn.decomposition import PCA

from mae_jax.evals import pixel_baseline


def values(count: int, size: int, rank: int, seed: int = 0) -> np.ndarray:
    """Returns float32 [count, size] of this rank about a mean that is not zero, each direction half the one before."""
    draws = np.random.default_rng(seed)
    directions = np.linalg.qr(draws.standard_normal((size, rank)))[0] * 0.5 ** np.arange(rank)
    return (draws.standard_normal((count, rank)) @ directions.T + draws.random(size)).astype(np.float32)


def test_the_components_are_those_of_scikit_learns_pca_whatever_their_signs():
    train, test = np.split(values(120, 300, 8), [80])
    peer = PCA(5).fit(train)
    ours, ours_of_test = pixel_baseline.principal_components(train, test, most=5)
    for coefficients, theirs in ((ours, peer.transform(train)), (ours_of_test, peer.transform(test))):
        signs = np.sign((coefficients * theirs).sum(0))
        np.testing.assert_allclose(coefficients * signs, theirs, atol=1e-4)


def test_no_component_is_of_rounding_alone():
    coefficients, = pixel_baseline.principal_components(values(50, 40, 3))
    assert coefficients.shape == (50, 3)


def test_components_of_a_sample_are_the_same_ones_every_time(monkeypatch):
    train = values(60, 20, 6)
    monkeypatch.setattr(pixel_baseline, "SAMPLE", 30)
    (once,), (again,) = pixel_baseline.principal_components(train), pixel_baseline.principal_components(train)
    np.testing.assert_array_equal(once, again)
    assert once.shape == (60, 6)
