"""Prediction targets of masked patches: token ids or pixels."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mae_jax.errors import UserError
from mae_jax.losses import patch_tokens, pixel_targets
from mae_jax.methods import patch_vocabulary
from mae_jax.methods.base import Extras
from mae_jax.ops.patches import PatchGrid, normalize
from mae_jax.rng import rng

PIXELS = ("norm_pix", "pixel")
GIVEN = "tokens"  # target of an external tokenizer, and the name of its batch field
SAMPLED = 16  # maximum number of patches sampled per entry of the vocabulary (our choice)


class PatchTargets:
    """The target of config.method.target, and the loss of predicting it."""

    def __init__(self, config: ConfigDict):
        m = config.method
        self.kind, self.size, self.seed = m.target, m.vocabulary, config.seed
        self.built = m.target in patch_tokens.KINDS
        self.discrete = self.built or m.target == GIVEN
        self.field = GIVEN if m.target == GIVEN else "patches"  # batch field of the targets
        self.file = m.vocabulary_file
        self.head_init = "normal" if self.discrete else "xavier"  # so that the cross-entropy starts at ln V
        self.values = PatchGrid.of(config).patch_dim
        self.outputs = m.vocabulary if self.discrete else self.values

    @staticmethod
    def validate(config: ConfigDict) -> None:
        m, given = config.method, config.data.tokens
        patch_tokens.check(m.target, m.vocabulary, (*patch_tokens.KINDS, GIVEN, *PIXELS))
        if given and m.target != GIVEN:
            raise UserError(f"data.tokens={given!r} is not read with method.target={m.target!r}; use {GIVEN!r}")
        if m.vocabulary_file and m.target not in patch_tokens.KINDS:
            raise UserError(f"method.vocabulary_file={m.vocabulary_file!r} is not read with method.target="
                            f"{m.target!r}; use one of {', '.join(patch_tokens.KINDS)}")

    def fields(self, spec: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns name → shape and dtype of the batch fields that the target needs besides those of `spec`."""
        return {GIVEN: jax.ShapeDtypeStruct(spec["order"].shape, jnp.int32)} if self.field == GIVEN else {}

    def start(self) -> Extras:
        """Returns the initial extras: a zero vocabulary float32 [V - 1, P] for targets that have one."""
        return {"vocabulary": jnp.zeros((self.size - 1, self.values), jnp.float32)} if self.built else {}

    def fit_extras(self, extras: Extras, batches: Iterable[dict[str, np.ndarray]] | None) -> Extras:
        """Builds the vocabulary from training patches, unless method.vocabulary_file names one; see `build`."""
        if not self.built or self.file or batches is None:
            return extras
        return {**extras, "vocabulary": self.build(batches)[0]}

    def stored_vocabulary(self) -> tuple[str, str, tuple[int, int]] | None:
        """See `Method.stored_vocabulary`."""
        return (self.file, self.kind, (self.size - 1, self.values)) if self.built and self.file else None

    def build(self, batches: Iterable[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """Returns a vocabulary float32 [V - 1, P], and the sampled patches uint8 [n, P] that it was built from."""
        sample = _sample(batches, SAMPLED * self.size, self.seed)
        return patch_vocabulary.build(sample, self.kind, self.size, rng(self.seed, "vocabulary", 0)), sample

    def losses(self, predicted: jax.Array, shown: jax.Array,
               extras: Extras) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss of each image, the mean over its predicted patches, and further metrics.

        Args:
          predicted: float32 [B, M, outputs].
          shown: the true values of the batch's `field`: patches uint8 [B, M, P] or tokens int32 [B, M].
          extras: the extras, with the vocabulary.

        Returns:
          float32 [B]; and, for tokens, 'accuracy' → float32 [B], otherwise {}.
        """
        if not self.discrete:
            pixels = normalize(shown)
            wanted = pixel_targets.norm_pix(pixels) if self.kind == "norm_pix" else pixels
            return jnp.square(predicted - wanted).mean((1, 2)), {}
        wanted = patch_tokens.tokenize(shown, extras["vocabulary"], self.kind) if self.built else shown
        losses = optax.softmax_cross_entropy_with_integer_labels(predicted, wanted).mean(1)
        return losses, {"accuracy": (predicted.argmax(-1) == wanted).mean(1, dtype=jnp.float32)}

    def flops(self, patches: int) -> int:
        """Returns the FLOPs of tokenizing a number of patches."""
        return 2 * patches * self.values * (self.size - 1) if self.built else 0


def _sample(batches: Iterable[dict[str, np.ndarray]], wanted: int, seed: int) -> np.ndarray:
    """Returns a uniform random sample of up to `wanted` non-constant patches of valid images, uint8 [n, P].

    Every patch draws a random number, and the patches with the lowest numbers are kept.
    """
    kept, marks = [], []
    for number, batch in enumerate(batches):
        patches = batch["patches"][batch["valid"] > 0].reshape(-1, batch["patches"].shape[-1])
        drawn = rng(seed, "vocabulary_sample", number).random(len(patches))
        varied = ~np.asarray(patch_tokens.constant(patches))
        kept.append(patches[varied])
        marks.append(drawn[varied])
        if sum(map(len, marks)) > 2 * wanted:
            kept, marks = _lowest(kept, marks, wanted)
    kept, marks = _lowest(kept, marks, wanted)
    return kept[0]


def _lowest(patches: list[np.ndarray], marks: list[np.ndarray],
            count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    everything, drawn = np.concatenate(patches), np.concatenate(marks)
    chosen = np.sort(np.argsort(drawn, kind="stable")[:count])
    return [everything[chosen]], [drawn[chosen]]
