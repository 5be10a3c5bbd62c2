"""RankMe: the effective rank of features, computed without labels (Garrido et al. 2023, arXiv 2210.02885)."""

from typing import Any

import numpy as np

from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context
from mae_jax.methods.base import Method
from mae_jax.rng import rng

SAMPLES = 25_600  # maximum number of images, as in the paper (section 3)
EPSILON = 1e-7  # added to each p_k, the paper's value for float32 (equation 2)


class RankMe(Evaluation):
    """'rankme' of the pooled features of the probes: from 1, for features in one direction, to the feature width.

    The paper uses projector outputs of training images. MAE has no projector: here, the features are the encoder's
    outputs after its last norm, for held-out images (our choices).
    """

    name = "rankme"

    def applies(self, method: Method, data: Any) -> bool:
        return method.task == "pretraining"

    def metric_names(self, method: Method, data: Any) -> list[str]:
        return ["rankme"]

    def scalars(self, ctx: Context) -> dict[str, float]:
        features = ctx.held_out.rows.get("features", ())
        return {"rankme": rankme(chosen(features))} if len(features) else {}


def chosen(features: np.ndarray, most: int = SAMPLES) -> np.ndarray:
    """Returns a fixed random sample of `most` rows of features [n, D], or all; splits may be ordered by class."""
    count = len(features)
    return features if count <= most else features[np.sort(rng(0, "rankme", 0).permutation(count)[:most])]


def rankme(features: np.ndarray) -> float:
    """Returns exp(-Σ p log p) over p_k = σ_k / Σ σ + 1e-7, σ the singular values (equations 1 and 2).

    The singular values are the square roots of the eigenvalues of the smaller Gram matrix, in float64. Their error is
    about 1e-8 of the largest one, below the 1e-7 that is added. Features are not centered, as in the paper.

    Args:
      features: float [n, D].

    Returns:
      About 1 to min(n, D); 0 if all features are zero (our choice: the paper's formula divides by zero); NaN if a
      feature is not finite.
    """
    wide = np.asarray(features, np.float64)
    largest = np.abs(wide).max(initial=0.0)
    if not np.isfinite(largest) or not largest:
        return 0.0 if largest == 0 else float("nan")
    wide = wide / largest
    gram = wide @ wide.T if len(wide) < wide.shape[1] else wide.T @ wide
    sigma = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0))
    shares = sigma / sigma.sum() + EPSILON
    return float(np.exp(-(shares * np.log(shares)).sum()))
