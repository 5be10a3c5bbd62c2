"""Weighted k-nearest-neighbor classification of frozen features (Wu et al. 2018; DINO, section 4.1)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.evals.base import Probe
from mae_jax.evals.context import Pair

CHUNK = 1024  # queries per call, to bound the size of the similarity matrix


class KNN(Probe):
    """Top-1 of held-out images by their nearest neighbors in the training split."""

    name, metric = "knn", "knn/top1"

    def accuracy(self, train: Pair, test: Pair, classes: int, c: ConfigDict) -> float:
        return top1(train, test, classes, c.knn_k, c.knn_temperature)


@partial(jax.jit, static_argnames=("classes", "k"))
def vote(queries: jax.Array, bank: jax.Array, labels: jax.Array, classes: int, k: int,
         temperature: float) -> jax.Array:
    """Returns class scores: the sum of exp(cosine / temperature) over the k nearest neighbors, up to a factor per row.

    Args:
      queries: float32 [n, D], of norm 1.
      bank: float32 [m, D], of norm 1.
      labels: int32 [m].
      classes: number of classes.
      k: number of neighbors.
      temperature: softmax temperature of the votes.

    Returns:
      float32 [n, classes].
    """
    # In bfloat16, the default precision of TPUs, near neighbors would tie.
    similarity, index = jax.lax.top_k(jnp.matmul(queries, bank.T, precision="highest"), k)
    votes = jnp.exp((similarity - similarity[:, :1]) / temperature)  # the common factor does not change the argmax
    return (jax.nn.one_hot(labels[index], classes) * votes[..., None]).sum(1)


def top1(train: Pair, test: Pair, classes: int, k: int, temperature: float) -> float:
    """Returns the k-NN accuracy in 0..1 on `test` with the neighbors in `train`, by cosine similarity.

    Args:
      train, test: features float32 [n, D] and labels int32 [n].
      classes: number of classes.
      k: number of neighbors, at most the number of training features.
      temperature: weights the votes, exp(cosine / temperature); a larger one makes them more equal.
    """
    def unit(features: np.ndarray) -> np.ndarray:
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    bank, queries, k = unit(train[0]), unit(test[0]), min(k, len(train[1]))
    scores = [np.asarray(vote(queries[i : i + CHUNK], bank, train[1], classes, k, temperature))
              for i in range(0, len(queries), CHUNK)]
    return float((np.concatenate(scores).argmax(1) == test[1]).mean())
