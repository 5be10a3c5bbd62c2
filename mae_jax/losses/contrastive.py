"""Contrastive losses: over the global batch, and over the tokens of a sequence."""

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops.example_ids import same
from mae_jax.ops.normalization import unit


def info_nce(pairs: jax.Array, valid: jax.Array, ids: jax.Array, temperature: float,
             normalize: bool = True) -> tuple[jax.Array, jax.Array]:
    """InfoNCE between two descriptors of each image; the negatives are both descriptors of all other images.

    SplitMask (arXiv 2112.10740), as the two descriptors of an image are alike among those of the batch; the set of
    negatives is that of SimCLR (arXiv 2002.05709, equation 1), which the article is taken to mean.

    Args:
      pairs: float [B, 2, D].
      valid: float32 [B]; an image of 0 is neither anchor nor negative.
      ids: int32 [B], or [B, 2]; rows that show the same image, of a small data set, are not each other's negatives.
      temperature: of the softmax.
      normalize: cosines; else plain products.

    Returns:
      float32 [B], the mean of both directions, and bool [B], whether both found their partner.
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
    """Contrast of each token with all others of its sequence, those of its own kind being alike; float32 [B, N].

    MixedAE's homologous contrastive loss, taken to be SupCon's L_out (arXiv 2004.11362, equation 2): the mean over the
    other tokens of the kind of -log(exp(s / τ) / sum of exp(s / τ) over all others), s being the cosine.

    Args:
      features: float [B, N, D].
      same: bool [N, N], which tokens are of one kind; each has another one of its kind. Grey stand-ins are a kind too.
      temperature: τ.
    """
    features = unit(features.astype(jnp.float32))
    logits = jnp.einsum("bnd,bmd->bnm", features, features, precision="highest") / temperature
    itself = np.eye(len(same), dtype=bool)
    positive = same & ~itself
    losses = jax.nn.logsumexp(jnp.where(itself, -jnp.inf, logits), -1, keepdims=True) - logits
    return jnp.where(positive, losses, 0).sum(-1) / positive.sum(-1)
