"""Contrastive losses, written over the global batch."""

import jax
import jax.numpy as jnp


def info_nce(pairs: jax.Array, valid: jax.Array, ids: jax.Array, temperature: float,
             normalise: bool = True) -> tuple[jax.Array, jax.Array]:
    """InfoNCE between two descriptors of each picture; the negatives are both descriptors of all other pictures.

    SplitMask (arXiv 2112.10740), as the two descriptors of a picture are alike among those of the batch; the set of
    negatives is that of SimCLR (arXiv 2002.05709, equation 1), which the article is taken to mean.

    Args:
      pairs: float [B, 2, D].
      valid: float32 [B]; a picture of 0 is neither anchor nor negative.
      ids: int32 [B]; rows that show the same picture, of a small data set, are not each other's negatives.
      temperature: of the softmax.
      normalise: cosines; else plain products.

    Returns:
      float32 [B], the mean of both directions, and bool [B], whether both found their partner.
    """
    images = len(pairs)
    both = pairs.reshape(2 * images, -1).astype(jnp.float32)  # every device keeps its rows
    if normalise:
        both = both / jnp.maximum(jnp.linalg.norm(both, axis=1, keepdims=True), 1e-6)
    own, shown = jnp.repeat(jnp.arange(images), 2), jnp.repeat(ids, 2)
    partner = (own[:, None] == own) & ~jnp.eye(2 * images, dtype=bool)
    negative = (shown[:, None] != shown) & jnp.repeat(valid > 0, 2)
    logits = jnp.matmul(both, both.T, precision="highest") / temperature
    logits = jnp.where(partner | negative, logits, -jnp.inf)
    positive = jnp.where(partner, logits, 0).sum(1)
    losses = jax.nn.logsumexp(logits, 1) - positive
    found = positive >= logits.max(1)
    return losses.reshape(images, 2).mean(1), found.reshape(images, 2).all(1)
