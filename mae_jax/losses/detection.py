"""The losses of a region proposal network and of the heads over regions, as Detectron2 has them.

Their divisors are those of the global batch, constants wherever a sample has a fixed number of boxes, so that they do
not depend on devices. Detectron2 takes the mean of each GPU's share of the positives for masks; ours is the mean over
all positives (our choice).
"""

import jax
import jax.numpy as jnp

from mae_jax.ops.detection.assignment import NEITHER, POSITIVE

Term = tuple[jax.Array, jax.Array]  # (sum, weight): the loss is their quotient


def proposal_losses(logits: jax.Array, deltas: jax.Array, kind: jax.Array, targets: jax.Array) -> tuple[Term, Term]:
    """Returns the losses of objectness and of anchors' deltas (1506.01497, equation 1, with L1 for boxes).

    Args:
      logits: float32 [B, S], of the anchors that were sampled.
      deltas: float32 [B, S, 4], for them.
      kind: int32 [B, S], as of `assignment.sample`.
      targets: float32 [B, S, 4], what the deltas of positives should be.
    """
    used, positive = kind != NEITHER, kind == POSITIVE
    entropy = jnp.where(used, sigmoid_cross_entropy(logits, positive), 0).sum()
    return (entropy, jnp.float32(kind.size)), (_absolute(deltas, targets, positive), jnp.float32(kind.size))


def region_losses(logits: jax.Array, deltas: jax.Array, kind: jax.Array, classes: jax.Array,
                  targets: jax.Array) -> tuple[Term, Term]:
    """Returns the losses of regions' classes and boxes (1504.08083, equation 1, with L1 for boxes).

    Args:
      logits: float32 [B, R, C + 1], of the regions that were sampled; the last one is the background's.
      deltas: float32 [B, R, C, 4], for each class, or [B, R, 1, 4] for all.
      kind: int32 [B, R], as of `assignment.sample`.
      classes: int32 [B, R], of the matched objects, below C.
      targets: float32 [B, R, 4], what the deltas of positives should be.
    """
    used, positive = kind != NEITHER, kind == POSITIVE
    background = logits.shape[-1] - 1
    truth = jax.nn.one_hot(jnp.where(positive, classes, background), background + 1)
    entropy = jnp.where(used, jax.nn.logsumexp(logits, -1) - (truth * logits).sum(-1), 0).sum()
    count = used.sum(dtype=jnp.float32)
    own = deltas[:, :, 0] if deltas.shape[2] == 1 else jnp.einsum(
        "brcd,brc->brd", deltas, truth[..., :-1], precision="highest")
    return (entropy, count), (_absolute(own, targets, positive), count)


def mask_loss(logits: jax.Array, classes: jax.Array, targets: jax.Array, positive: jax.Array) -> Term:
    """Returns the loss of masks: binary cross-entropy of the true class's channel (1703.06870, section 3).

    Args:
      logits: float32 [B, R, side, side, C].
      classes: int32 [B, R], below C.
      targets: float32 [B, R, side, side] of 0 and 1.
      positive: bool [B, R]; the others count nowhere.
    """
    truth = jax.nn.one_hot(classes, logits.shape[-1])
    own = jnp.einsum("bryxc,brc->bryx", logits, truth, precision="highest")
    mean = sigmoid_cross_entropy(own, targets).mean((-2, -1))
    return jnp.where(positive, mean, 0).sum(), positive.sum(dtype=jnp.float32)


def sigmoid_cross_entropy(logits: jax.Array, truth: jax.Array) -> jax.Array:
    """Returns the binary cross-entropy of each logit [...] with a truth [...] of 0 to 1."""
    return jax.nn.softplus(logits) - logits * truth


def _absolute(deltas: jax.Array, targets: jax.Array, positive: jax.Array) -> jax.Array:
    """Returns the sum of the absolute errors of positives; what others have for targets may be anything."""
    return jnp.where(positive[..., None], jnp.abs(deltas - jnp.where(positive[..., None], targets, 0)), 0).sum()
