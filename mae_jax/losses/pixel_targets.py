"""What a hidden patch is asked for: pixels, normalised pixels, or PCA coefficients of the patch."""

import jax
import jax.numpy as jnp

EPS = 1e-6  # added to the variance of a patch; MAE's published setting
PCA_COMPONENTS = 96  # MAE Table 1d


def patch_moments(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and deviation [..., 1] of each patch over all its P values (unbiased variance, MAE 3.1)."""
    mean = patches.mean(-1, keepdims=True)
    variance = patches.var(-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(variance + EPS)


def norm_pix(patches: jax.Array) -> jax.Array:
    """Normalises each patch of [..., P] by its own mean and deviation (MAE 3.1, 'reconstruction target')."""
    mean, deviation = patch_moments(patches)
    return (patches - mean) / deviation


def fit_pca(patches: jax.Array, components: int) -> dict[str, jax.Array]:
    """Returns the mean [P] and the leading principal axes [P, components] of patches [..., P]."""
    rows = patches.reshape(-1, patches.shape[-1])
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / rows.shape[0]
    _, vectors = jnp.linalg.eigh(covariance)  # ascending eigenvalues
    return {"mean": mean, "axes": vectors[:, ::-1][:, :components]}


def project_pca(patches: jax.Array, pca: dict[str, jax.Array]) -> jax.Array:
    """Returns the PCA coefficients [..., components] of patches [..., P] (MAE Table 1d; not whitened: our choice)."""
    return (patches - pca["mean"]) @ pca["axes"]


def unproject_pca(coefficients: jax.Array, pca: dict[str, jax.Array]) -> jax.Array:
    """Returns the patches [..., P] that the coefficients [..., components] stand for."""
    return coefficients @ pca["axes"].T + pca["mean"]
