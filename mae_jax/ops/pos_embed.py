"""Learned position embeddings for another grid of patches."""

import numpy as np

SHARPNESS = -0.75  # of the cubic kernel, as torch's interpolate has it; JAX's and PIL's is -0.5


def resize(table: np.ndarray, grid: tuple[int, int], to: tuple[int, int]) -> np.ndarray:
    """Returns position embeddings [N', D] for the grid `to`, of [N, D] for `grid`, both in raster order.

    Bicubic without antialiasing, pixel centres at halves and edges repeated: torch.nn.functional.interpolate with
    mode='bicubic' and align_corners=False, as MAE and DeiT adapt theirs.
    """
    if table.shape[0] != grid[0] * grid[1]:
        raise ValueError(f"{table.shape[0]} positions are no grid of {grid[0]} x {grid[1]}")
    square = np.asarray(table, np.float64).reshape(*grid, -1)
    out = np.einsum("yr,xc,rcd->yxd", cubic(grid[0], to[0]), cubic(grid[1], to[1]), square)
    return out.reshape(to[0] * to[1], -1).astype(np.float32)


def cubic(size: int, to: int) -> np.ndarray:
    """Returns the weights [to, size] of cubic convolution along one axis (Keys 1981)."""
    centers = (np.arange(to) + 0.5) * size / to - 0.5
    taps = np.floor(centers).astype(int)[:, None] + np.arange(-1, 3)
    weights = np.zeros((to, size))
    np.add.at(weights, (np.arange(to)[:, None], taps.clip(0, size - 1)), _kernel(np.abs(centers[:, None] - taps)))
    return weights


def _kernel(x: np.ndarray) -> np.ndarray:
    """Keys' kernel at distances x ≥ 0."""
    a = SHARPNESS
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
