"""Reconstruction targets of masked patches: pixels, per-patch normalized pixels, PCA coefficients."""

import jax
import jax.numpy as jnp

EPS = 1e-6  # added to the variance of a patch; MAE's published setting
PCA_COMPONENTS = 96  # MAE Table 1d


def patch_moments(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and standard deviation, float32 [..., 1] each, of patches [..., P] (unbiased variance, MAE 3.1)."""
    mean = patches.mean(-1, keepdims=True)
    variance = patches.var(-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(variance + EPS)


def norm_pix(patches: jax.Array) -> jax.Array:
    """Normalizes patches [..., P] with their own mean and standard deviation (MAE 3.1, 'reconstruction target')."""
    mean, deviation = patch_moments(patches)
    return (patches - mean) / deviation


def fit_pca(patches: jax.Array, components: int) -> dict[str, jax.Array]:
    """Fits a PCA to patches [..., P]; returns `mean` [P] and `axes` [P, components], leading axes first."""
    rows = patches.reshape(-1, patches.shape[-1])
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / rows.shape[0]
    _, vectors = jnp.linalg.eigh(covariance)  # ascending eigenvalues
    return {"mean": mean, "axes": vectors[:, ::-1][:, :components]}


def project_pca(patches: jax.Array, pca: dict[str, jax.Array]) -> jax.Array:
    """Returns the PCA coefficients [..., components] of patches [..., P] (MAE Table 1d; not whitened: our choice)."""
    return (patches - pca["mean"]) @ pca["axes"]


def unproject_pca(coefficients: jax.Array, pca: dict[str, jax.Array]) -> jax.Array:
    """Returns the patches [..., P] for PCA coefficients [..., components]."""
    return coefficients @ pca["axes"].T + pca["mean"]
