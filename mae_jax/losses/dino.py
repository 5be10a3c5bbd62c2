"""Self-distillation (DINO, arXiv 2104.14294): the loss over pairs of views, and the center of the teacher's outputs."""

import jax
import jax.numpy as jnp


def cross_entropy(targets: jax.Array, student_logits: jax.Array, same: bool = False) -> jax.Array:
    """Returns the mean cross-entropy of each image over pairs of a teacher's view and a different student's view.

    Args:
      targets: probabilities of the teacher, float32 [B, T, K], for T views.
      student_logits: logits of the student, float32 [B, T + S, K]; the first T views are the teacher's.
      same: True: pair each view of the teacher with the same view of the student instead; S must be 0.

    Returns:
      float32 [B].
    """
    products = jnp.einsum("btk,bsk->bts", targets, student_logits, precision="highest")
    losses = jax.nn.logsumexp(student_logits, -1)[:, None] - products  # targets sum to 1
    count, views = losses.shape[1:]
    pairs = jnp.eye(count, views, dtype=bool) == same
    return jnp.where(pairs, losses, 0).sum((1, 2)) / pairs.sum()


def update_center(center: jax.Array, outputs: jax.Array, valid: jax.Array, momentum: float) -> jax.Array:
    """Returns the moving average of the teacher's mean output over the global batch (equation 4).

    Args:
      center: float32 [K].
      outputs: of the teacher, float32 [B, T, K].
      valid: float32 [B] of 0 and 1; images with 0 are ignored. If all are ignored, the center stays.
      momentum: weight of the previous center.
    """
    weight = valid.sum()
    mean = (outputs.mean(1) * valid[:, None]).sum(0) / jnp.maximum(weight, 1)
    return jnp.where(weight > 0, momentum * center + (1 - momentum) * mean, center)
