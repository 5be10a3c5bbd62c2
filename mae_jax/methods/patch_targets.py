"""What a patch that the encoder did not see is asked for: a discrete token, or its pixels."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mae_jax.data.random import rng
from mae_jax.methods.base import Extras
from mae_jax.ops import targets, tokens
from mae_jax.ops.patches import normalize, patch_values

PIXELS = ("norm_pix", "pixel")
SAMPLED = 16  # patches sampled per entry of the vocabulary, where there are as many (our choice)

DEFAULTS = {
    "target": "kmeans",  # tokens: kmeans, patches, projection; pixels: norm_pix, pixel
    "vocabulary": 8192,  # how many tokens, that of constant patches among them
}


class PatchTargets:
    """The target that config.method names, and the loss of predicting it."""

    def __init__(self, config: ConfigDict):
        m = config.method
        self.kind, self.size, self.seed = m.target, m.vocabulary, config.seed
        self.discrete = m.target in tokens.KINDS
        self.head_init = "normal" if self.discrete else "xavier"  # so that the cross-entropy starts at ln V
        self.values = patch_values(config)
        self.outputs = m.vocabulary if self.discrete else self.values

    @staticmethod
    def validate(config: ConfigDict) -> None:
        tokens.check(config.method.target, config.method.vocabulary, (*tokens.KINDS, *PIXELS))

    def start(self) -> Extras:
        """Returns the extras before `fit`: a vocabulary float32 [V - 1, P], where the target has one."""
        return {"vocabulary": jnp.zeros((self.size - 1, self.values), jnp.float32)} if self.discrete else {}

    def fit(self, extras: Extras, pictures: Iterable[dict[str, np.ndarray]]) -> Extras:
        """Builds the vocabulary from patches of training pictures; see `tokens.build`."""
        if not self.discrete:
            return extras
        wanted = SAMPLED * self.size
        sample = _sample(pictures, wanted, self.seed)
        return {**extras, "vocabulary": tokens.build(sample, self.kind, self.size, rng(self.seed, "vocabulary", 0))}

    def losses(self, predicted: jax.Array, patches: jax.Array,
               extras: Extras) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns each picture's mean loss over its predicted patches, and figures likewise.

        Args:
          predicted: float32 [B, M, outputs].
          patches: uint8 [B, M, P], what was there.
          extras: with the vocabulary.

        Returns:
          float32 [B], and for tokens 'accuracy' → float32 [B].
        """
        if not self.discrete:
            pixels = normalize(patches)
            wanted = targets.norm_pix(pixels) if self.kind == "norm_pix" else pixels
            return jnp.square(predicted - wanted).mean((1, 2)), {}
        wanted = tokens.tokenize(patches, extras["vocabulary"], self.kind)
        losses = optax.softmax_cross_entropy_with_integer_labels(predicted, wanted).mean(1)
        return losses, {"accuracy": (predicted.argmax(-1) == wanted).mean(1, dtype=jnp.float32)}

    def flops(self, patches: int) -> int:
        """Returns the FLOPs of naming so many patches."""
        return 2 * patches * self.values * (self.size - 1) if self.discrete else 0


def _sample(pictures: Iterable[dict[str, np.ndarray]], wanted: int, seed: int) -> np.ndarray:
    """Returns up to `wanted` patches uint8 [n, P] of the valid pictures, a random sample over all of them.

    Every patch draws a number; those of the lowest ones are kept, so that no picture counts more than another.
    """
    kept, marks = [], []
    for number, batch in enumerate(pictures):
        patches = batch["patches"][batch["valid"] > 0].reshape(-1, batch["patches"].shape[-1])
        drawn = rng(seed, "vocabulary_sample", number).random(len(patches))
        kept.append(patches)
        marks.append(drawn)
        if sum(map(len, marks)) > 2 * wanted:
            kept, marks = _lowest(kept, marks, wanted)
    kept, marks = _lowest(kept, marks, wanted)
    return kept[0]


def _lowest(patches: list[np.ndarray], marks: list[np.ndarray],
            count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    everything, drawn = np.concatenate(patches), np.concatenate(marks)
    chosen = np.sort(np.argsort(drawn, kind="stable")[:count])
    return [everything[chosen]], [drawn[chosen]]
