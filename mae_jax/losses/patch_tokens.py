"""Discrete tokens of patches: a vocabulary of V - 1 entries built from the training images, and token 0.

Token 0 is that of constant patches (each channel has one value): no direction describes them, and the images of some
data sets are full of them. SplitMask (arXiv 2112.10740) compares such simple vocabularies with the trained tokenizer of
BEiT; how it prepares the patches is not known to us, so the preparations below are our choice.
"""

import jax
import jax.numpy as jnp

from mae_jax.errors import UserError, did_you_mean
from mae_jax.ops.patches import normalize

KINDS = ("kmeans", "patches", "projection")
MIN_VOCABULARY = 3  # tokens: of constant patches, and two others


def constant(patches: jax.Array) -> jax.Array:
    """Returns bool [...]: which uint8 patches [..., P], channel fastest, have one value in each channel."""
    channels = patches.reshape(*patches.shape[:-1], -1, 3)
    return (channels.max(-2) == channels.min(-2)).all(-1)


def prepared(patches: jax.Array, kind: str) -> jax.Array:
    """Returns what is compared with the vocabulary, float32 [..., P]: for projections, without each channel's mean.

    Without that, nearly all patches would have the few tokens of directions near a plain colour.
    """
    pixels = normalize(patches)
    if kind != "projection":
        return pixels
    channels = pixels.reshape(*pixels.shape[:-1], -1, 3)
    return (channels - channels.mean(-2, keepdims=True)).reshape(pixels.shape)


def tokenize(patches: jax.Array, vocabulary: jax.Array, kind: str) -> jax.Array:
    """Returns the tokens int32 [...] of uint8 patches [..., P]: the nearest entry by cosine or (kmeans) by distance.

    The article gives a patch the entry of the highest cosine; k-means means distances.
    """
    if kind == "kmeans":
        directions, shift = vocabulary, -jnp.square(vocabulary).sum(1) / 2
    else:
        directions, shift = vocabulary / jnp.linalg.norm(vocabulary, axis=1, keepdims=True), 0.0
    scores = jnp.matmul(prepared(patches, kind), directions.T, precision="highest") + shift
    return jnp.where(constant(patches), 0, 1 + scores.argmax(-1)).astype(jnp.int32)


def check(kind: str, size: int, kinds: tuple[str, ...]) -> None:
    """Raises UserError for an unknown target, or a vocabulary that is none."""
    if kind not in kinds:
        raise UserError(f"method.target={kind!r}; {did_you_mean(kind, kinds)}")
    if size < MIN_VOCABULARY:
        raise UserError(f"method.vocabulary={size}; it must be at least {MIN_VOCABULARY}")
