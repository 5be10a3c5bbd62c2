"""The losses of a region proposal network and of the heads over regions, as Detectron2 has them.

Their divisors are those of the global batch, constants wherever a sample has a fixed number of boxes, so that they do
not depend on devices. Detectron2 takes the mean of each GPU's share of the positives for masks; ours is the mean over
all positives (our choice).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mae_jax.ops.detection.assignment import NEITHER, POSITIVE
from mae_jax.ops.detection.boxes import generalized_iou

Term = tuple[jax.Array, jax.Array]  # (sum, weight): the loss is their quotient


def proposal_losses(logits: jax.Array, deltas: jax.Array, kind: jax.Array, targets: jax.Array, images: jax.Array,
                    beta: float = 0.0) -> tuple[Term, Term]:
    """Returns the losses of objectness and of anchors' deltas (1506.01497, equation 1).

    Both are divided by S for each image, also where fewer anchors were sampled.

    Args:
      logits: float32 [B, S], of the anchors that were sampled.
      deltas: float32 [B, S, 4], for them.
      kind: int32 [B, S], as of `assignment.sample`.
      targets: float32 [B, S, 4], what the deltas of positives should be.
      images: float32 [], how many of the B are no padding.
      beta: of `smooth_l1`.
    """
    used, positive, count = kind != NEITHER, kind == POSITIVE, kind.shape[1] * images
    entropy = jnp.where(used, sigmoid_cross_entropy(logits, positive), 0).sum()
    return (entropy, count), (_distance(deltas, targets, positive, beta), count)


def region_losses(logits: jax.Array, deltas: jax.Array, kind: jax.Array, classes: jax.Array, targets: jax.Array,
                  decode: Callable[[jax.Array], jax.Array] | None = None) -> tuple[Term, Term]:
    """Returns the losses of regions' classes and boxes (1504.08083, equation 1), boxes by L1 or by generalized IoU.

    Both are divided by the number of all regions, also those without an object.

    Args:
      logits: float32 [B, R, C + 1], of the regions that were sampled; the last one is the background's.
      deltas: float32 [B, R, C, 4], for each class, or [B, R, 1, 4] for all.
      kind: int32 [B, R], as of `assignment.sample`.
      classes: int32 [B, R], of the matched objects, below C.
      targets: float32 [B, R, 4], what the deltas of positives should be, as `boxes.encode` makes them.
      decode: for the loss of generalized IoU: makes boxes [B, R, 4] of such deltas.
    """
    used, positive = kind != NEITHER, kind == POSITIVE
    background = logits.shape[-1] - 1
    truth = jax.nn.one_hot(jnp.where(positive, classes, background), background + 1)
    entropy = jnp.where(used, jax.nn.logsumexp(logits, -1) - (truth * logits).sum(-1), 0).sum()
    count = used.sum(dtype=jnp.float32)
    own = deltas[:, :, 0] if deltas.shape[2] == 1 else jnp.einsum(
        "brcd,brc->brd", deltas, truth[..., :-1], precision="highest")
    if not decode:
        return (entropy, count), (_distance(own, targets, positive), count)
    # What is no positive stays where it is in both: its loss is not taken, and its gradient is finite.
    own, targets = (decode(jnp.where(positive[..., None], deltas, 0)) for deltas in (own, targets))
    away = jnp.where(positive, 1 - generalized_iou(own, targets), 0).sum()
    return (entropy, count), (away, count)


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


def smooth_l1(error: jax.Array, beta: float) -> jax.Array:
    """Returns the absolute error [...] less β / 2, and below β its square / (2 β) (1504.08083, equation 3)."""
    size = jnp.abs(error)
    return jnp.where(size < beta, error**2 / (2 * beta), size - beta / 2) if beta else size


def _distance(deltas: jax.Array, targets: jax.Array, positive: jax.Array, beta: float = 0.0) -> jax.Array:
    """Returns the sum of the errors of positives; what others have for targets may be anything."""
    error = deltas - jnp.where(positive[..., None], targets, 0)
    return jnp.where(positive[..., None], smooth_l1(error, beta), 0).sum()
