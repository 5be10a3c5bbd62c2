"""Routing to experts: top-1 choice with its weight, and the regularizers of gates (MoCE, arXiv 2402.05382)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MIN_PROBABILITY = 1e-9  # lower bound inside a logarithm, which keeps its gradient finite


class Choice(NamedTuple):
    """One expert for each of B rows, and the factor of its output."""

    expert: jax.Array  # int32 [B]
    weight: jax.Array  # float32 [B]

    def of(self, rows: jax.Array) -> "Choice":
        """Returns the choices at the indices `rows`, int32 [B']."""
        return Choice(self.expert[rows], self.weight[rows])


def choose(probabilities: jax.Array, straight: bool) -> Choice:
    """Chooses the expert with the largest probability g for each row.

    Args:
      probabilities: float32 [B, E], a softmax over all experts. A softmax over the chosen expert alone would be 1, and
        the gate would not learn.
      straight: True: the weight is g / stop_gradient(g), with the value 1 and the gradient of log g. False: it is g.
    """
    expert = probabilities.argmax(-1).astype(jnp.int32)
    gate = jnp.take_along_axis(probabilities, expert[:, None], -1)[:, 0]
    return Choice(expert, gate / jax.lax.stop_gradient(gate) if straight else gate)


def imbalance(probabilities: jax.Array, share: jax.Array) -> jax.Array:
    """Returns the squared coefficient of variation of the experts' importance (V-MoE, arXiv 2106.05974, A.2).

    Args:
      probabilities: float32 [m, E] of m rows.
      share: float32 [m], the weight of each row; the weights sum to 1.

    Returns:
      float32 [], 0 to E - 1.
    """
    importance = share @ probabilities
    return importance.var() / jnp.square(importance.mean())


def uncertainty(probabilities: jax.Array, share: jax.Array) -> jax.Array:
    """Returns the mean entropy of the rows' probabilities, float32 [], 0 to ln E; arguments as in `imbalance`.

    A small entropy together with a small imbalance means a large mutual information between row and expert.
    """
    return -(share @ (probabilities * jnp.log(jnp.maximum(probabilities, MIN_PROBABILITY))).sum(-1))
