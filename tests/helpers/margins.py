"""How clear answers are: a count of right ones is the same on every processor only where no two are about as good."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from mae_jax.evals import knn, linear_probe
from mae_jax.methods.base import Batch, Method


def least(scores: np.ndarray) -> float:
    """Returns by how much the best of scores [n, C] exceeds the second one at least."""
    second, best = np.sort(scores, axis=1)[:, -2:].T
    return float((best - second).min())


def of_classifier(method: Method, params: Any, extras: Any, batches: Iterable[Batch]) -> float:
    """Returns the least margin of a classifier's logits over the images of the batches."""
    logits = jax.jit(method.logits)
    return min(least(np.asarray(logits(params, extras, batch))[batch["valid"] > 0]) for batch in batches)


@contextlib.contextmanager
def of_probes() -> Iterator[list[float]]:
    """Yields a list that gets the least margin of each comparison that linear probes and k-NN make meanwhile."""
    found: list[float] = []
    vote, accuracy = knn.vote, linear_probe.accuracy

    def voting(*args: Any) -> jax.Array:
        scores = vote(*args)
        found.append(least(np.asarray(scores)))
        return scores

    def judging(weights: jax.Array, features: np.ndarray, labels: np.ndarray) -> float:
        found.append(least(np.asarray(features @ np.asarray(weights[:-1]) + np.asarray(weights[-1]))))
        return accuracy(weights, features, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "vote", voting)
        patch.setattr(linear_probe, "accuracy", judging)
        yield found
