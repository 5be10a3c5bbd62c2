"""Projections of image features to a plane, PCA and t-SNE, and nearest neighbors."""

import os

import numpy as np

from mae_jax.errors import UserError, pluralize

# Set before scikit-learn starts its threads: spinning threads take the cores from other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
NEIGHBORS = 12
ROWS = 512  # rows of the similarity matrix in memory at a time
PERPLEXITY = 30.0  # scikit-learn's default
COMPONENTS = 50  # principal components before t-SNE (van der Maaten and Hinton, 2008, section 4.2)
FEW = 200  # number of images below which the exact method is as fast
LEAST = 10  # number of images for t-SNE


def check(features: np.ndarray) -> None:
    """Raises UserError if features, float [n, D], are not all finite."""
    bad = int((~np.isfinite(features).all(1)).sum())
    if bad:
        raise UserError(f"the features of {pluralize(bad, 'image')} are not finite; no map can be drawn")


def pca(features: np.ndarray) -> tuple[np.ndarray, float]:
    """Projects features, float [n, D], to their first two principal components.

    Returns:
      Coordinates, float32 [n, 2], and the components' share of the variance.
    """
    from sklearn.decomposition import PCA

    if min(features.shape) < 2 or not features.std(0).any():  # one image, or images that are all alike
        return np.zeros((len(features), 2), np.float32), 1.0
    model = PCA(2, random_state=0)
    places = model.fit_transform(features.astype(np.float32))
    return places.astype(np.float32), float(model.explained_variance_ratio_.sum())


def tsne(features: np.ndarray) -> np.ndarray:
    """Returns t-SNE coordinates, float32 [n, 2], of features, float [n, D], at unit length; n >= LEAST.

    At unit length, small distances are high cosines.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    units = unit(features)
    if min(units.shape) > COMPONENTS:
        units = PCA(COMPONENTS, random_state=0).fit_transform(units)
    # PCA cannot initialize identical features.
    start = "pca" if units.std(0).any() else "random"
    method = "exact" if len(units) < FEW else "barnes_hut"
    model = TSNE(2, method=method, perplexity=min(PERPLEXITY, (len(units) - 1) / 3), init=start, random_state=0)
    return model.fit_transform(units).astype(np.float32)


def neighbors(features: np.ndarray, count: int = NEIGHBORS) -> tuple[np.ndarray, np.ndarray]:
    """Returns the other images with the highest cosines to each image, best first.

    Args:
      features: float [n, D].
      count: k, at most n - 1.

    Returns:
      Their indices, uint32 [n, k], and cosines, float32 [n, k].
    """
    units, count = unit(features), min(count, len(features) - 1)
    found = np.zeros((len(units), count), np.uint32)
    cosines = np.zeros((len(units), count), np.float32)
    for first in range(0, len(units) if count else 0, ROWS):
        near = units[first:first + ROWS] @ units.T
        rows = np.arange(len(near))
        near[rows, first + rows] = -np.inf
        best = np.argpartition(near, -count, axis=1)[:, -count:]
        values = np.take_along_axis(near, best, 1)
        order = np.argsort(-values, axis=1, kind="stable")
        found[first:first + ROWS] = np.take_along_axis(best, order, 1)
        cosines[first:first + ROWS] = np.take_along_axis(values, order, 1)
    return found, cosines


def unit(features: np.ndarray) -> np.ndarray:
    """Scales features [n, D] to unit length, float32; zeros stay zeros."""
    features = features.astype(np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
