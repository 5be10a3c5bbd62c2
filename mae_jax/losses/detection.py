"""The losses of a region proposal network and of the region heads, as in Detectron2.

Sums are divided by counts of the global batch, so that the losses do not depend on the number of devices. Detectron2
averages the mask loss over each GPU's own positives; here it is the mean over all positives (our choice).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mae_jax.ops.detection.assignment import NEITHER, POSITIVE
from mae_jax.ops.detection.boxes import generalized_iou

Term = tuple[jax.Array, jax.Array]  # (sum, weight): the loss is their quotient


def proposal_losses(logits: jax.Array, deltas: jax.Array, kind: jax.Array, targets: jax.Array, images: jax.Array,
                    beta: float = 0.0) -> tuple[Term, Term]:
    """Returns the losses of the anchors' objectness and deltas (arXiv 1506.01497, equation 1).

    Both are divided by S · images, even if fewer anchors were sampled.

    Args:
      logits: objectness logits of the sampled anchors, float32 [B, S].
      deltas: predicted deltas, float32 [B, S, 4].
      kind: int32 [B, S] from `assignment.sample`.
      targets: target deltas float32 [B, S, 4], read for positives only.
      images: float32 [], the number of images that are not padding.
      beta: of `smooth_l1`.
    """
    used, positive, count = kind != NEITHER, kind == POSITIVE, kind.shape[1] * images
    entropy = jnp.where(used, sigmoid_cross_entropy(logits, positive), 0).sum()
    return (entropy, count), (_distance(deltas, targets, positive, beta), count)


def region_losses(logits: jax.Array, deltas: jax.Array, kind: jax.Array, classes: jax.Array, targets: jax.Array,
                  decode: Callable[[jax.Array], jax.Array] | None = None) -> tuple[Term, Term]:
    """Returns the losses of the regions' classes and boxes (arXiv 1504.08083, equation 1); L1 or generalized IoU.

    Both are divided by the number of sampled regions, including background.

    Args:
      logits: class logits of the sampled regions, float32 [B, R, C + 1]; the last class is background.
      deltas: predicted deltas, float32 [B, R, C, 4] per class or [B, R, 1, 4] for all classes.
      kind: int32 [B, R] from `assignment.sample`.
      classes: classes of the matched objects, int32 [B, R], below C.
      targets: target deltas float32 [B, R, 4] from `boxes.encode`, read for positives only.
      decode: maps deltas [B, R, 4] to boxes [B, R, 4]; if given, the box loss is 1 - generalized IoU instead of L1.
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
    # Zero deltas for all but positives, whose losses are masked, keep the gradients finite.
    own, targets = (decode(jnp.where(positive[..., None], deltas, 0)) for deltas in (own, targets))
    away = jnp.where(positive, 1 - generalized_iou(own, targets), 0).sum()
    return (entropy, count), (away, count)


def mask_loss(logits: jax.Array, classes: jax.Array, targets: jax.Array, positive: jax.Array) -> Term:
    """Returns the mask loss, the binary cross-entropy of the true class's channel (arXiv 1703.06870, section 3).

    Args:
      logits: float32 [B, R, side, side, C].
      classes: int32 [B, R], below C.
      targets: float32 [B, R, side, side] of 0 and 1.
      positive: bool [B, R]; other regions are ignored.
    """
    truth = jax.nn.one_hot(classes, logits.shape[-1])
    own = jnp.einsum("bryxc,brc->bryx", logits, truth, precision="highest")
    mean = sigmoid_cross_entropy(own, targets).mean((-2, -1))
    return jnp.where(positive, mean, 0).sum(), positive.sum(dtype=jnp.float32)


def sigmoid_cross_entropy(logits: jax.Array, truth: jax.Array) -> jax.Array:
    """Returns the binary cross-entropy [...] of logits [...] with targets `truth` [...] from 0 to 1."""
    return jax.nn.softplus(logits) - logits * truth


def smooth_l1(error: jax.Array, beta: float) -> jax.Array:
    """Returns the smooth L1 loss [...] of errors [...] (arXiv 1504.08083, equation 3).

    It is e² / (2 β) for |e| < β and |e| - β / 2 otherwise; plain L1 for β = 0.
    """
    size = jnp.abs(error)
    return jnp.where(size < beta, error**2 / (2 * beta), size - beta / 2) if beta else size


def _distance(deltas: jax.Array, targets: jax.Array, positive: jax.Array, beta: float = 0.0) -> jax.Array:
    """Returns the sum of `smooth_l1` over positives; targets of other boxes may have any value, even NaN."""
    error = deltas - jnp.where(positive[..., None], targets, 0)
    return jnp.where(positive[..., None], smooth_l1(error, beta), 0).sum()
