"""The vote of neighbors against a plain loop and scikit-learn."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from mae_jax.evals import knn
from tests.helpers import margins
from tests.helpers.blobs import CLASSES, blobs


def cosines(train, test) -> np.ndarray:
    """Returns the cosines of each test row with all training rows, in float64."""
    ours, theirs = (part[0].astype(np.float64) for part in (test, train))
    return np.array([[row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in theirs] for row in ours])


def neighbors(train, test, k: int, temperature: float) -> np.ndarray:
    """Returns the vote's class for each test row, one row and one neighbor at a time; no vote is nearly a tie."""
    found = []
    for cosine in cosines(train, test):
        votes = np.zeros(CLASSES)
        for index in np.argsort(cosine)[::-1][:k]:
            votes[train[1][index]] += np.exp((cosine[index] - cosine.max()) / temperature)
        found.append(votes)
    assert margins.least(np.array(found)) > 1e-4
    return np.argmax(found, 1)


def assert_clear(train, test, k: int) -> None:
    """The k nearest are the same ones in float32, however a sum is ordered."""
    ordered = np.sort(cosines(train, test))[:, ::-1]
    assert k >= len(train[1]) or (ordered[:, k - 1] - ordered[:, k]).min() > 1e-6


@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
@pytest.mark.parametrize("k", [1, 5, 20, 1000])
def test_knn_is_the_weighted_vote_of_the_nearest_by_cosine(k, temperature):
    train, test = blobs(90, seed=0), blobs(60, seed=1)
    assert_clear(train, test, k)
    wanted = (neighbors(train, test, k, temperature) == test[1]).mean()
    assert knn.top1(train, test, CLASSES, k, temperature) == pytest.approx(wanted)


def test_the_temperature_changes_votes():
    train, test = blobs(90, seed=0), blobs(60, seed=1)
    assert (neighbors(train, test, 20, 0.02) != neighbors(train, test, 20, 1.0)).any()


@pytest.mark.parametrize("k", [1, 7, 20])
def test_at_a_high_temperature_every_neighbor_votes_alike_as_scikit_learn_has_it(k):
    train, test = blobs(200, seed=0), blobs(150, seed=1)
    assert_clear(train, test, k)
    peer = KNeighborsClassifier(k, metric="cosine").fit(*train)
    assert knn.top1(train, test, CLASSES, k, 1e9) == pytest.approx(peer.score(*test))


def test_knn_in_chunks_is_knn(monkeypatch):
    train, test = blobs(90, seed=0), blobs(61, seed=1)
    whole = knn.top1(train, test, CLASSES, 5, 0.07)
    monkeypatch.setattr(knn, "CHUNK", 16)
    assert knn.top1(train, test, CLASSES, 5, 0.07) == whole
