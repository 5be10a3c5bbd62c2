"""Vocabularies of patch tokens, built from training images."""

import logging

import numpy as np

from mae_jax.errors import UserError
from mae_jax.losses.patch_tokens import MIN_VOCABULARY, constant, prepared, tokenize
from mae_jax.ops.kmeans import kmeans

logger = logging.getLogger(__name__)
PERPLEXITY_DIVISOR = 20  # the perplexity must be at least V / 20: below, most patches share a few tokens
MIN_PATCHES_PER_ENTRY = 5  # minimum of sampled patches per entry: a larger vocabulary would memorize single patches


def build(patches: np.ndarray, kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Builds a vocabulary of `size` - 1 entries.

    Args:
      patches: uint8 [n, P], sampled from the training images.
      kind: 'kmeans' (cluster centers), 'patches' (random patches of the sample) or 'projection' (random directions).
      size: V.
      rng: generator of the entries, or of the initial centers.

    Returns:
      float32 [V - 1, P].

    Raises:
      UserError: the sample is too small for the vocabulary, or the perplexity is too low.
    """
    varied = patches[~np.asarray(constant(patches))] if len(patches) else patches
    if len(varied) < MIN_PATCHES_PER_ENTRY * MIN_VOCABULARY:
        raise UserError(f"only {len(varied)} of the sampled patches have more than one color, too few for a "
                        "vocabulary; use method.target=norm_pix, or more images")
    if len(varied) < MIN_PATCHES_PER_ENTRY * size:
        raise UserError(f"method.vocabulary={size} is more than a fifth of the {len(varied)} sampled patches that are "
                        f"not constant; use at most {len(varied) // MIN_PATCHES_PER_ENTRY}, or a larger "
                        "eval.max_examples, the number of sampled images")
    if kind == "projection":
        entries = rng.normal(size=(size - 1, patches.shape[1])).astype(np.float32)
    elif kind == "patches":
        entries = np.asarray(prepared(rng.permutation(varied)[: size - 1], kind))
    else:
        entries = kmeans(np.asarray(prepared(varied, kind)), size - 1, rng)
    chunks = np.array_split(varied, -(-len(varied) // 4096))
    used = perplexity(np.concatenate([np.asarray(tokenize(chunk, entries, kind)) for chunk in chunks]))
    logger.info("method.target=%s: %d sampled patches that are not constant have a perplexity of %.1f tokens, of "
                "method.vocabulary=%d", kind, len(varied), used, size)
    if used < size / PERPLEXITY_DIVISOR:
        raise UserError(f"method.target={kind!r}: {len(varied)} sampled patches have a perplexity of {used:.1f} "
                        f"tokens, less than a twentieth of method.vocabulary={size}; use a smaller one")
    return entries


def perplexity(tokens: np.ndarray) -> float:
    """Returns the perplexity of tokens int [n], exp of their entropy; token 0 is left out."""
    shares = np.bincount(tokens[tokens > 0])
    shares = shares[shares > 0] / max(shares.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum()))
