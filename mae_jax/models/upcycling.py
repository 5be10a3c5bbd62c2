"""Conversions between dense encoders and encoders with experts: upcycling, and extraction of one path of experts."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mae_jax.param_tree import flatten, nest

EXPERT = re.compile(r"(encoder/block_(\d+)/)experts/(fc[12]/(?:kernel|bias))")


def upcycle(loaded: Any, params: Any) -> Any:
    """Initializes missing experts from the dense MLP of the same block (sparse upcycling, arXiv 2212.05055).

    Args:
      loaded: parameters of a dense encoder or of one with experts.
      params: the model's parameters or their shapes.

    Returns:
      `loaded`, in which each MLP that the model replaces by E experts is repeated E times. Experts in `loaded` stay.
    """
    theirs = flatten(loaded)
    for name, leaf in flatten(params).items():
        if (found := EXPERT.fullmatch(name)) and name not in theirs:
            dense = theirs.get(f"{found[1]}mlp/{found[3]}")
            if dense is not None:
                theirs[name] = np.broadcast_to(np.asarray(dense), (leaf.shape[0], *dense.shape))
    taken = {f"{found[1]}mlp/{found[3]}" for name in flatten(params) if (found := EXPERT.fullmatch(name))}
    return nest({name: leaf for name, leaf in theirs.items() if name not in taken})


def extract_path(encoder: Any, path: Mapping[int, int], scale: Mapping[int, float] | None = None) -> dict[str, Any]:
    """Returns the parameters of the dense encoder that keeps one expert per block.

    Args:
      encoder: parameters of an encoder, without the prefix `encoder/`.
      path: block → index of the expert to keep.
      scale: block → factor of the expert's output, which is folded into its last layer; 1 for other blocks.
    """
    out = {}
    for name, leaf in flatten({"encoder": encoder}).items():
        found = EXPERT.fullmatch(name)
        if not found:
            if "/experts/" not in name:  # a dense encoder has no token gate
                out[name] = leaf
            continue
        block = int(found[2])
        factor = (scale or {}).get(block, 1.0) if found[3].startswith("fc2") else 1.0
        out[f"{found[1]}mlp/{found[3]}"] = leaf[path[block]] * factor if factor != 1.0 else leaf[path[block]]
    return nest(out)["encoder"]
