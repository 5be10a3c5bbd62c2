"""Gates: which expert is chosen, how much its answer counts, and what keeps gates balanced and confident (MoCE)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MIN_PROBABILITY = 1e-9  # probability in a logarithm, whose gradient would have no end


class Choice(NamedTuple):
    """One expert for each of B rows."""

    expert: jax.Array  # int32 [B]
    weight: jax.Array  # float32 [B], what its output is multiplied by

    def of(self, rows: jax.Array) -> "Choice":
        """Returns the choice for rows that are numbers of these, int32 [B']."""
        return Choice(self.expert[rows], self.weight[rows])


def choose(probabilities: jax.Array, straight: bool) -> Choice:
    """Chooses the expert of the largest probability g for rows [B, E].

    Args:
      probabilities: float32, of a softmax over all experts: after the choice it would be 1, and gates would not learn.
      straight: the weight is g / stop_gradient(g), whose value is 1 and whose gradient is that of log g; else g.
    """
    expert = probabilities.argmax(-1).astype(jnp.int32)
    gate = jnp.take_along_axis(probabilities, expert[:, None], -1)[:, 0]
    return Choice(expert, gate / jax.lax.stop_gradient(gate) if straight else gate)


def imbalance(probabilities: jax.Array, share: jax.Array) -> jax.Array:
    """Returns the squared coefficient of variation of experts' importance, 0 to E - 1 (V-MoE, arXiv 2106.05974, A.2).

    Args:
      probabilities: float32 [m, E].
      share: float32 [m], how much each row counts; sums to 1.
    """
    importance = share @ probabilities
    return importance.var() / jnp.square(importance.mean())


def uncertainty(probabilities: jax.Array, share: jax.Array) -> jax.Array:
    """Returns the mean entropy of the rows, 0 to ln E; arguments as of `imbalance`.

    With a small imbalance, a small one means that the choice tells much of the row: together they are the mutual
    information of the two.
    """
    return -(share @ (probabilities * jnp.log(jnp.maximum(probabilities, MIN_PROBABILITY))).sum(-1))
