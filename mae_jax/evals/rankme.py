"""RankMe: how many dimensions a representation uses, without labels (Garrido et al. 2023, arXiv 2210.02885)."""

from typing import Any

import numpy as np

from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context
from mae_jax.methods.base import Method
from mae_jax.rng import rng

SAMPLES = 25_600  # images at most, as in the paper (section 3)
EPSILON = 1e-7  # added to each share, the paper's value for float32 (equation 2)


class RankMe(Evaluation):
    """'rankme' of the pooled features that are probed: 1 where all of them are one direction, at most their width.

    The paper's features are what a projector makes of training images. A MAE has no projector: here they are the
    encoder's, after its last norm, of held-out images (our choices).
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
    """Returns `most` rows of features [n, D] or all: drawn, since a split may come class by class, and always alike."""
    count = len(features)
    return features if count <= most else features[np.sort(rng(0, "rankme", 0).permutation(count)[:most])]


def rankme(features: np.ndarray) -> float:
    """Returns exp(-Σ p log p) over p_k = σ_k / Σ σ + 1e-7, σ the singular values (equations 1 and 2).

    The singular values are the roots of the eigenvalues of the smaller Gram matrix, in float64: they are exact to some
    1e-8 of the largest one, below what 1e-7 blurs. Features are not centered, as in the paper.

    Args:
      features: float [n, D].

    Returns:
      About 1 to min(n, D); 0 for features that are all zero (our choice: the paper's formula divides by zero); NaN
      where one is not finite.
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
