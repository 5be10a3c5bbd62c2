"""Discrete tokens of patches: a vocabulary of V - 1 entries built from the training pictures, and token 0.

Token 0 is that of constant patches (each channel has one value): no direction describes them, and the pictures of some
data sets are full of them. SplitMask (arXiv 2112.10740) compares such simple vocabularies with the trained tokenizer of
BEiT; how it prepares the patches is not known to us, so the preparations below are our choice.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mae_jax.arrays import opened
from mae_jax.errors import UserError, nearest
from mae_jax.files import locate
from mae_jax.ops.clustering import kmeans
from mae_jax.ops.patches import normalize

logger = logging.getLogger(__name__)
KINDS = ("kmeans", "patches", "projection")
LEAST = 3  # tokens: of constant patches, and two others
LEAST_USED = 20  # the perplexity is at least V / 20: below, most patches share few tokens
LEAST_PATCHES = 5  # sampled patches per entry: a larger vocabulary would know single patches by heart


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


def build(patches: np.ndarray, kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Builds a vocabulary of `size` - 1 entries.

    Args:
      patches: uint8 [n, P], sampled from the training pictures.
      kind: 'kmeans' (centres of clusters), 'patches' (random ones of the sample) or 'projection' (random directions).
      size: V.
      rng: draws entries, or the first centres.

    Returns:
      float32 [V - 1, P].

    Raises:
      UserError: the sample is too small for the size, or its patches share too few tokens.
    """
    varied = patches[~np.asarray(constant(patches))] if len(patches) else patches
    if len(varied) < LEAST_PATCHES * LEAST:
        raise UserError(f"only {len(varied)} of the sampled patches are not of one colour: too few for a vocabulary; "
                        "use method.target=norm_pix, or more pictures")
    if len(varied) < LEAST_PATCHES * size:
        raise UserError(f"method.vocabulary={size} is more than a fifth of the {len(varied)} sampled patches that are "
                        f"not constant; use at most {len(varied) // LEAST_PATCHES}, or a larger eval.max_examples: "
                        "no more pictures are sampled")
    if kind == "projection":
        entries = rng.normal(size=(size - 1, patches.shape[1])).astype(np.float32)
    elif kind == "patches":
        entries = np.asarray(prepared(rng.permutation(varied)[: size - 1], kind))
    else:
        entries = kmeans(np.asarray(prepared(varied, kind)), size - 1, rng)
    chunks = np.array_split(varied, -(-len(varied) // 4096))
    used = perplexity(np.concatenate([np.asarray(tokenize(chunk, entries, kind)) for chunk in chunks]))
    logger.info("method.target=%s: %d sampled patches that are not constant use the method.vocabulary=%d as %.1f "
                "tokens would be used evenly (perplexity)", kind, len(varied), size, used)
    if used < size / LEAST_USED:
        raise UserError(f"method.target={kind!r}: {len(varied)} sampled patches use the method.vocabulary={size} as "
                        f"{used:.1f} tokens would be used evenly (perplexity), less than a twentieth; use a smaller "
                        "one")
    return entries


def save(file: epath.PathLike, entries: np.ndarray, kind: str) -> None:
    """Writes a vocabulary [V - 1, P] as *.npz, with what kind it is."""
    path = locate(str(file))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as stored:
        np.savez(stored, vocabulary=entries, kind=np.array(kind))
    partial.replace(path)


def load(file: epath.PathLike, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """Reads a vocabulary float32 of a kind and a shape (V - 1, P); raises UserError for any other."""
    path = locate(str(file))
    if not path.is_file():
        raise UserError(f"method.vocabulary_file={file!r} is no file; python -m mae_jax.cluster writes one")
    with opened(path) as stored:
        if not {"vocabulary", "kind"} <= set(stored.files):
            raise UserError(f"{path} is no vocabulary: it has {', '.join(stored.files)}")
        entries, found = stored["vocabulary"], str(stored["kind"])
    if found != kind or entries.shape != shape:
        raise UserError(f"{path} holds {found!r} of shape {list(entries.shape)} (tokens but one, values of a patch); "
                        f"the config has {kind!r} and {list(shape)}")
    if entries.dtype.kind != "f" or not np.isfinite(entries).all():
        raise UserError(f"{path} holds values of type {entries.dtype}, or some that are not finite: no vocabulary")
    return entries


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


def perplexity(tokens: np.ndarray) -> float:
    """Returns how many tokens, used evenly, would be as uncertain: exp of the entropy of those that are not 0."""
    shares = np.bincount(tokens[tokens > 0])
    shares = shares[shares > 0] / max(shares.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def check(kind: str, size: int, kinds: tuple[str, ...]) -> None:
    """Raises UserError for an unknown target, or a vocabulary that is none."""
    if kind not in kinds:
        raise UserError(f"method.target={kind!r}; {nearest(kind, kinds)}")
    if size < LEAST:
        raise UserError(f"method.vocabulary={size}; it must be at least {LEAST}")
