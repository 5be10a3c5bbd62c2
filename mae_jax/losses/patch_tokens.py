"""Discrete tokens of patches: token 0, and V - 1 entries of a vocabulary built from the training images.

Token 0 stands for constant patches (one value per channel), which have no direction and are frequent in some data sets.
SplitMask (arXiv 2112.10740) compares such simple vocabularies with the trained tokenizer of BEiT. The paper does not
say how patches are preprocessed; the preprocessing here is our choice.
"""

import jax
import jax.numpy as jnp

from mae_jax.errors import UserError, did_you_mean
from mae_jax.ops.patches import normalize

KINDS = ("kmeans", "patches", "projection")
MIN_VOCABULARY = 3  # token 0 and two entries


def constant(patches: jax.Array) -> jax.Array:
    """Returns which uint8 patches [..., P], channel fastest, have a single value per channel, bool [...]."""
    channels = patches.reshape(*patches.shape[:-1], -1, 3)
    return (channels.max(-2) == channels.min(-2)).all(-1)


def prepared(patches: jax.Array, kind: str) -> jax.Array:
    """Preprocesses uint8 patches [..., P] for comparison with the vocabulary; returns float32 [..., P].

    Pixels are normalized. For the kind 'projection', the mean of each channel is removed too; otherwise nearly all
    patches would get the few tokens whose directions are close to a plain color.
    """
    pixels = normalize(patches)
    if kind != "projection":
        return pixels
    channels = pixels.reshape(*pixels.shape[:-1], -1, 3)
    return (channels - channels.mean(-2, keepdims=True)).reshape(pixels.shape)


def tokenize(patches: jax.Array, vocabulary: jax.Array, kind: str) -> jax.Array:
    """Returns the tokens int32 [...], 0 to V - 1, of uint8 patches [..., P].

    The token is that of the entry with the highest cosine similarity, as in the paper, or for 'kmeans' with the
    smallest Euclidean distance.

    Args:
      patches: uint8 [..., P], channel fastest.
      vocabulary: float32 [V - 1, P].
      kind: one of KINDS.
    """
    if kind == "kmeans":
        directions, shift = vocabulary, -jnp.square(vocabulary).sum(1) / 2
    else:
        directions, shift = vocabulary / jnp.linalg.norm(vocabulary, axis=1, keepdims=True), 0.0
    scores = jnp.matmul(prepared(patches, kind), directions.T, precision="highest") + shift
    return jnp.where(constant(patches), 0, 1 + scores.argmax(-1)).astype(jnp.int32)


def check(kind: str, size: int, kinds: tuple[str, ...]) -> None:
    """Checks the config fields `method.target` and `method.vocabulary`.

    Raises:
      UserError: `kind` is not in `kinds`, or `size` is below MIN_VOCABULARY.
    """
    if kind not in kinds:
        raise UserError(f"method.target={kind!r}; {did_you_mean(kind, kinds)}")
    if size < MIN_VOCABULARY:
        raise UserError(f"method.vocabulary={size}; it must be at least {MIN_VOCABULARY}")
