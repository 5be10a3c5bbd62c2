"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018; DINO, section 4.1)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.evals.base import Probe
from mae_jax.evals.context import Pair

CHUNK = 1024  # queries at a time, to bound the similarity matrix


class KNN(Probe):
    """Top-1 of the held-out images by their nearest neighbors in the training split."""

    name, metric = "knn", "knn/top1"

    def accuracy(self, train: Pair, test: Pair, classes: int, c: ConfigDict) -> float:
        return top1(train, test, classes, c.knn_k, c.knn_temperature)


@partial(jax.jit, static_argnames=("classes", "k"))
def vote(queries: jax.Array, bank: jax.Array, labels: jax.Array, classes: int, k: int,
         temperature: float) -> jax.Array:
    """Returns class scores [n, classes]: each of the k nearest votes exp(cosine / temperature) for its label."""
    # In bfloat16, the default of TPUs, near neighbours would be ties.
    similarity, index = jax.lax.top_k(jnp.matmul(queries, bank.T, precision="highest"), k)
    votes = jnp.exp((similarity - similarity[:, :1]) / temperature)  # a common factor changes no vote
    return (jax.nn.one_hot(labels[index], classes) * votes[..., None]).sum(1)


def top1(train: Pair, test: Pair, classes: int, k: int, temperature: float) -> float:
    """Returns the accuracy of (features [n, D], labels [n]) `test` by its neighbours in `train`, cosine similarity.

    The temperature says how much more the nearer ones count; the larger, the more equal the votes.
    """
    def unit(features: np.ndarray) -> np.ndarray:
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    bank, queries, k = unit(train[0]), unit(test[0]), min(k, len(train[1]))
    scores = [np.asarray(vote(queries[i : i + CHUNK], bank, train[1], classes, k, temperature))
              for i in range(0, len(queries), CHUNK)]
    return float((np.concatenate(scores).argmax(1) == test[1]).mean())
