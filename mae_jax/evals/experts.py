"""Who chooses which expert of a MoCE: shares, clusters, what that tells of the label, and what each expert sees."""

from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from mae_jax.evals.reconstruct import tile
from mae_jax.methods.base import Batch
from mae_jax.methods.moce import MoCE
from mae_jax.models.inside import block_name
from mae_jax.ops.patches import assemble, grid

SHOWN = 10  # pictures of each expert


def routes(method: MoCE, params: Any, extras: Any) -> dict[int, np.ndarray]:
    """Returns block → the expert of each cluster, int [m], without noise."""
    table = jax.device_get(jax.jit(method.probabilities)(params, extras))
    return {block: each.argmax(1) for block, each in table.items()}


def figures(method: MoCE, params: Any, extras: Any, cluster: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Returns figures for each block with experts.

    'share/<block>/<expert>' of the pictures; 'clusters/<block>/<expert>', how many it has; and where pictures have
    labels, 'label_information/<block>': I(expert; label) / H(label), 0 to 1.

    Args:
      method: whose gates read clusters; else nothing is returned.
      params, extras: its state.
      cluster, label: int [n] of the pictures; a label of -1 is none.
    """
    if method.by_token or not len(cluster):
        return {}
    out: dict[str, float] = {}
    for block, expert in routes(method, params, extras).items():
        name, count = block_name(block), method.config.method.experts
        own = expert[cluster]
        shares, clusters = (np.bincount(which, minlength=count) for which in (own, expert))
        out |= {f"share/{name}/{i}": float(share) for i, share in enumerate(shares / len(own))}
        out |= {f"clusters/{name}/{i}": float(number) for i, number in enumerate(clusters)}
        known = label >= 0
        if len(np.unique(label[known])) > 1:
            out[f"label_information/{name}"] = information(own[known], label[known])
    return out


def information(choice: np.ndarray, label: np.ndarray) -> float:
    """Returns I(choice; label) / H(label) of two arrays of whole numbers [n]."""
    joint = np.zeros((choice.max() + 1, label.max() + 1))
    np.add.at(joint, (choice, label), 1 / len(choice))

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    of_label = entropy(joint.sum(0))
    return (entropy(joint.sum(1)) + of_label - entropy(joint.ravel())) / of_label


def picture(method: MoCE, params: Any, extras: Any, batch: Batch) -> np.ndarray:
    """Returns a grid with a row for each block and expert: pictures of `batch` that it is chosen for."""
    batch = {name: np.asarray(process_allgather(batch[name], tiled=True))
             for name in ("patches", "order", "cluster", "valid")}
    pictures = assemble(batch["patches"], batch["order"], grid(method.config), tuple(method.config.model.patch))
    blank, rows, names = np.full_like(pictures[0], 255), [], []
    for block, expert in routes(method, params, extras).items():
        for number in range(method.config.method.experts):
            own = np.flatnonzero((expert[batch["cluster"]] == number) & (batch["valid"] > 0))[:SHOWN]
            rows.append([*pictures[own], *[blank] * (SHOWN - len(own))])
            names.append(f"{block}/{number}")
    return tile(rows, [""] * SHOWN, f"what each expert sees; a row for each block/expert: {', '.join(names)}")
