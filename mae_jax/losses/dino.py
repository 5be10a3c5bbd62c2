"""Self-distillation (DINO, arXiv 2104.14294): the loss over pairs of views, and the centre of the teacher's outputs."""

import jax
import jax.numpy as jnp


def cross_entropy(targets: jax.Array, student_logits: jax.Array, same: bool = False) -> jax.Array:
    """Returns each image's mean cross-entropy over pairs of a teacher's view and another one of the student's.

    Args:
      targets: float32 [B, T, K], probabilities of the teacher's views.
      student_logits: float32 [B, T + S, K], logits of the student's; its first T views are those of the teacher.
      same: compares each of the teacher's views with the student's same one instead (S is then 0).

    Returns:
      float32 [B].
    """
    products = jnp.einsum("btk,bsk->bts", targets, student_logits, precision="highest")
    losses = jax.nn.logsumexp(student_logits, -1)[:, None] - products  # targets sum to 1
    count, views = losses.shape[1:]
    pairs = jnp.eye(count, views, dtype=bool) == same
    return jnp.where(pairs, losses, 0).sum((1, 2)) / pairs.sum()


def update_center(center: jax.Array, outputs: jax.Array, valid: jax.Array, momentum: float) -> jax.Array:
    """Moves the centre [K] towards the mean of the global batch's outputs [B, T, K] (equation 4).

    Images whose `valid` float32 [B] is 0 do not count; where none is left the centre stays.
    """
    weight = valid.sum()
    mean = (outputs.mean(1) * valid[:, None]).sum(0) / jnp.maximum(weight, 1)
    return jnp.where(weight > 0, momentum * center + (1 - momentum) * mean, center)
