"""Bicubic resizing of position embeddings to another grid of patches."""

import numpy as np

SHARPNESS = -0.75  # parameter a of the cubic kernel, as in torch's interpolate; JAX and Pillow use -0.5


def resize(table: np.ndarray, grid: tuple[int, int], to: tuple[int, int]) -> np.ndarray:
    """Resizes position embeddings from one grid to another, as MAE and DeiT do.

    Bicubic without antialiasing, with pixel centers at halves and repeated edges: the same as
    `torch.nn.functional.interpolate` with mode='bicubic' and align_corners=False.

    Args:
      table: [N, D] in raster order.
      grid: its (rows, columns).
      to: (rows, columns) of the result.

    Returns:
      float32 [N', D] in raster order.

    Raises:
      ValueError: N is not rows · columns.
    """
    if table.shape[0] != grid[0] * grid[1]:
        raise ValueError(f"{table.shape[0]} positions are no grid of {grid[0]} x {grid[1]}")
    square = np.asarray(table, np.float64).reshape(*grid, -1)
    out = np.einsum("yr,xc,rcd->yxd", cubic(grid[0], to[0]), cubic(grid[1], to[1]), square)
    return out.reshape(to[0] * to[1], -1).astype(np.float32)


def cubic(size: int, to: int) -> np.ndarray:
    """Returns the weights, float64 [to, size], of cubic convolution along one axis (Keys 1981)."""
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
