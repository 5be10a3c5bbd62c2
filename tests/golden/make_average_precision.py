"""Writes average_precision.npz: made-up objects and detections, and what pycocotools says of them.

  python tests/golden/make_average_precision.py      (needs pycocotools; its readers do not)
"""

from pathlib import Path

import numpy as np

from mae_jax.evals import average_precision
from tests.helpers.detected import flat, scenes

SEEDS = (0, 1, 2)


def main() -> None:
    out: dict[str, np.ndarray] = {}
    for seed in SEEDS:
        truth, found = scenes(seed=seed)
        out |= {f"{seed}/{name}": value for name, value in flat(truth, found).items()}
        for kind in ("box", "mask"):
            figures = average_precision.of_pycocotools(truth, found, kind == "mask")
            out[f"{seed}/{kind}"] = np.array([figures[name] for name in average_precision.FIGURES])
    np.savez_compressed(Path(__file__).with_name("average_precision.npz"), **out)


if __name__ == "__main__":
    main()
