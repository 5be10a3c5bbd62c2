"""Clusters of images by the features of a frozen encoder: the output of `python -m mae_jax cluster --from=...`.

A folder, local or gs://:

  clusters.npz         centroids float32 [m, D] of length 1, prices float32 [m], mean float32 [D] of the features,
                       sizes int64 [m], and assigned/<split> int32 [n]: the cluster by example id, -1 for none
  meta.json            the data and the encoder behind them, sizes and balance
  encoder.safetensors  the frozen encoder, with its config; image size, crop and patch are those of the features
  clusters.png         the images nearest to each centroid, one row per centroid
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.errors import UserError
from mae_jax.runtime import bounded_json
from mae_jax.storage import paths
from mae_jax.storage.file_kinds import unreadable
from mae_jax.storage.npz import opened

FIELD = "cluster"
PREFIX = "assigned/"
NAMES = ("centroids", "prices", "mean", "sizes")
EPS = 1e-6  # added to variances
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Clusters:
    """Centroids of centered, unit-length features, and the cluster assignment of each image."""

    centroids: np.ndarray  # float32 [m, D]
    prices: np.ndarray  # float32 [m], subtracted from similarities to balance the cluster sizes
    mean: np.ndarray  # float32 [D]
    sizes: np.ndarray  # int64 [m], of the training split
    assigned: dict[str, np.ndarray] = field(default_factory=dict)  # split expression → int32 [n]
    meta: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Returns a short hash of the centroids and the assignments."""
        return fingerprint({"centroids": self.centroids, "assigned": self.assigned})

    def standard(self) -> np.ndarray:
        """Returns the centroids as the gates read them, each normalized as by a layer norm, float32 [m, D]."""
        centered = self.centroids - self.centroids.mean(1, keepdims=True)
        return centered / np.sqrt(centered.var(1, keepdims=True) + EPS)

    def nearest(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the clusters int32 [n] of features [n, D] of the frozen encoder, and similarities float32 [n]."""
        from mae_jax.ops import spherical_kmeans  # imports JAX, which worker processes avoid

        points = spherical_kmeans.unit(features - self.mean).astype(np.float32)
        return spherical_kmeans.assign(lambda: iter([points]), self.centroids, self.prices)

    def write(self, folder: epath.Path) -> None:
        """Writes meta.json, then clusters.npz, whose presence means that both are complete."""
        paths.replace_text(folder / "meta.json", json.dumps(self.meta, indent=1) + "\n")
        arrays = {name: getattr(self, name) for name in NAMES}
        content = io.BytesIO()
        np.savez(content, **arrays, **{PREFIX + split: found for split, found in self.assigned.items()})
        paths.replace_bytes(folder / "clusters.npz", content.getvalue())

    @classmethod
    def read(cls, folder: str) -> "Clusters":
        """Reads a folder that `write` wrote; raises UserError if it is missing or damaged."""
        path = paths.locate(folder, "method.clusters")
        if not folder or not (path / "clusters.npz").is_file():
            raise UserError(f"method.clusters={folder!r} has no clusters.npz; make it with the encoder of a MAE: "
                            "mae_jax cluster --from=WORKDIR --to=FOLDER")
        with opened(path / "clusters.npz", "; remove it, and cluster again") as stored:
            arrays = {name: stored[name] for name in stored.files}
        content = paths.read_bytes(path / "meta.json")
        if content is None:
            raise UserError(f"{path} has no meta.json, which mae_jax cluster writes beside clusters.npz; restore it, "
                            "or remove both and cluster again")
        try:
            meta = bounded_json.parse_object(content)
        except ValueError as error:
            raise UserError(f"{unreadable(path / 'meta.json', content, error)}; restore the one that mae_jax "
                            "cluster wrote beside clusters.npz") from None
        named = [name for name in arrays if name.startswith(PREFIX)]
        assigned = {name.removeprefix(PREFIX): arrays.pop(name) for name in named}
        _check(path, arrays, assigned, meta)
        return cls(**arrays, assigned=assigned, meta=meta)


def _check(path: epath.Path, arrays: dict[str, np.ndarray], assigned: dict[str, np.ndarray],
           meta: dict[str, Any]) -> None:
    """Raises UserError if a folder does not have the content that `Clusters.write` writes."""
    wrong = ""
    if set(arrays) != set(NAMES):
        wrong = f"clusters.npz has the arrays {', '.join(sorted(arrays)) or 'none'}; expected {', '.join(NAMES)}"
    elif arrays["centroids"].ndim != 2 or len(arrays["prices"]) != len(arrays["centroids"]):
        wrong = f"centroids are {list(arrays['centroids'].shape)}; expected [clusters, features]"
    elif any(of.ndim != 1 or not np.issubdtype(of.dtype, np.integer) for of in assigned.values()):
        wrong = "clusters.npz assigns images to what is no number of a cluster"
    elif not {"source", "name", "classes"} <= (meta["data"].keys() if isinstance(meta.get("data"), dict) else set()):
        wrong = "meta.json does not say of which data they are ('data': source, name, classes)"
    elif not isinstance(meta.get("examples", {}), dict):
        wrong = "meta.json has no object 'examples'"
    if wrong:
        raise UserError(f"{path} was not written by mae_jax cluster, or is damaged: {wrong}")


def fingerprint(arrays: Any) -> str:
    """Returns a short hash of the values of nested dicts of arrays."""
    from mae_jax.param_tree import flatten  # imports JAX, which worker processes avoid

    digest = hashlib.sha256()
    for name, array in sorted(flatten(arrays).items()):
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def of_splits(found: Clusters, folder: str, data: ConfigDict, parts: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns split expression → cluster by id, int32 [n], for the splits in the config.

    Args:
      found: the clusters.
      folder: their folder, for messages.
      data: the config group `data`.
      parts: split expression → its examples, see `data.Inputs`.

    Raises:
      UserError: the clusters belong to other data, or to other splits of the data.
    """
    for name in ("source", "name", "classes"):
        if data[name] != found.meta["data"][name]:
            raise UserError(f"the clusters in {folder} were made with data.{name}={found.meta['data'][name]!r}; the "
                            f"config has {data[name]!r}")
    for split, part in parts.items():
        if split not in found.assigned:
            raise UserError(f"{folder} has no clusters of the split {split!r}; it has {', '.join(found.assigned)}; "
                            "cluster with the config's splits")
        there = int((found.assigned[split] >= 0).sum())
        if there != part.size:
            raise UserError(f"{folder} has the clusters of {there} examples of {split!r}, but the data has "
                            f"{part.size}; cluster again, into another folder")
        if found.meta.get("examples", {}).get(split) != part.digest():
            raise UserError(f"{folder} has the clusters of other examples of {split!r} than the data has, by their "
                            "names or order; cluster again, into another folder")
    return found.assigned


def joined(make: Callable[..., Iterator[Batch]], assigned: np.ndarray) -> Callable[..., Iterator[Batch]]:
    """Returns `make` with the field `cluster` int32 [B] added to its batches, -1 in padding."""
    def batches(*args: Any) -> Iterator[Batch]:
        for batch in make(*args):
            yield {**batch, FIELD: np.where(batch["id"] < 0, -1, assigned[batch["id"]]).astype(np.int32)}

    return batches
