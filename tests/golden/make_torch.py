"""Writes torch.npz: bicubic interpolation of position embeddings and BatchNorm1d without scale and shift, in float64.

  python tests/golden/make_torch.py      (needs torch; the tests that read the file do not)
"""

from pathlib import Path

import numpy as np
import torch

GRIDS = [((14, 14), (24, 24)), ((14, 14), (12, 10)), ((7, 7), (14, 14))]
BATCHES, ROWS, WIDTH = 3, 6, 8


def positions(grid: tuple[int, int], to: tuple[int, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns a random table [N, 3] and what MAE's and DeiT's interpolation makes of it."""
    table = rng.standard_normal((grid[0] * grid[1], 3)).astype(np.float32)
    picture = torch.from_numpy(table).double().reshape(1, *grid, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(picture, to, mode="bicubic", align_corners=False)
    return {"from": table, "to": resized.permute(0, 2, 3, 1).flatten(0, 2).numpy().astype(np.float32)}


def batch_norm(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns batches of features, what training normalizes them to, the moments after each, and an evaluation."""
    norm = torch.nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6).double()
    features = (rng.standard_normal((BATCHES, ROWS, WIDTH)) * rng.uniform(0.1, 3, WIDTH) + 1).astype(np.float32)
    outputs, means, variances = [], [], []
    for batch in torch.from_numpy(features).double():
        outputs.append(norm(batch).numpy())
        means.append(norm.running_mean.clone().numpy())
        variances.append(norm.running_var.clone().numpy())
    evaluated = norm.eval()(torch.from_numpy(features[0]).double()).numpy()
    return {"features": features, "outputs": np.stack(outputs), "means": np.stack(means),
            "variances": np.stack(variances), "evaluated": evaluated}


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = {f"batch_norm/{key}": values for key, values in batch_norm(rng).items()}
    for (rows, columns), (to_rows, to_columns) in GRIDS:
        name = f"positions/{rows}x{columns}/{to_rows}x{to_columns}"
        found = positions((rows, columns), (to_rows, to_columns), rng)
        arrays |= {f"{name}/{key}": values for key, values in found.items()}
    np.savez_compressed(Path(__file__).with_name("torch.npz"), **arrays)


if __name__ == "__main__":
    main()
