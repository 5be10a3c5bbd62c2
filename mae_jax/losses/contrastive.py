"""Contrastive losses: between the images of the global batch, and between the tokens of a sequence."""

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops.example_ids import same
from mae_jax.ops.normalization import unit


def info_nce(pairs: jax.Array, valid: jax.Array, ids: jax.Array, temperature: float,
             normalize: bool = True) -> tuple[jax.Array, jax.Array]:
    """Returns the InfoNCE loss between two descriptors of each image, whose negatives come from all other images.

    This is SplitMask's contrastive loss (arXiv 2112.10740), whose negatives are the other images of the batch. We take
    both descriptors of each of them, as SimCLR does (arXiv 2002.05709, equation 1; our reading).

    Args:
      pairs: two descriptors of each image, float [B, 2, D].
      valid: float32 [B]; images with 0 are not used as negatives, and the caller must ignore their losses.
      ids: example ids, int32 [B] or [B, 2]; rows with the same id are not negatives of each other.
      temperature: divides the logits.
      normalize: True: cosine similarities; False: dot products.

    Returns:
      Losses float32 [B], the mean over both anchors, and bool [B]: whether both anchors are most similar to their
      positives.
    """
    images = len(pairs)
    both = pairs.reshape(2 * images, -1).astype(jnp.float32)  # every device keeps its rows
    if normalize:
        both = unit(both)
    own = jnp.repeat(jnp.arange(images), 2)
    partner = (own[:, None] == own) & ~jnp.eye(2 * images, dtype=bool)
    negative = ~same(jnp.repeat(ids, 2, axis=0)) & jnp.repeat(valid > 0, 2)
    logits = jnp.matmul(both, both.T, precision="highest") / temperature
    logits = jnp.where(partner | negative, logits, -jnp.inf)
    positive = jnp.where(partner, logits, 0).sum(1)
    losses = jax.nn.logsumexp(logits, 1) - positive
    found = positive >= logits.max(1)
    return losses.reshape(images, 2).mean(1), found.reshape(images, 2).all(1)


def supervised_contrast(features: jax.Array, same: np.ndarray, temperature: float) -> jax.Array:
    """Returns the supervised contrastive loss of each token within its sequence, float32 [B, N].

    This is MixedAE's homologous contrastive loss (arXiv 2303.17152), computed as SupCon's L_out (arXiv 2004.11362,
    equation 2; our reading): the mean over positives of -log(exp(s / τ) / Σ exp(s / τ) over all other tokens), where s
    is the cosine similarity.

    Args:
      features: float [B, N, D].
      same: bool [N, N], which tokens are positives of each other; every token needs one besides itself.
      temperature: τ.
    """
    features = unit(features.astype(jnp.float32))
    logits = jnp.einsum("bnd,bmd->bnm", features, features, precision="highest") / temperature
    itself = np.eye(len(same), dtype=bool)
    positive = same & ~itself
    losses = jax.nn.logsumexp(jnp.where(itself, -jnp.inf, logits), -1, keepdims=True) - logits
    return jnp.where(positive, losses, 0).sum(-1) / positive.sum(-1)
