"""Features of whole splits, on disk in chunks: computed once, resumed where they were cut off, read again in passes.

A picture that cannot be read has the features of a grey one, which count for nothing but its own cluster.
"""

import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mae_jax.errors import UserError
from mae_jax.methods.base import Method, pool
from mae_jax.ops import spherical_kmeans
from mae_jax.ops.example_ids import whole as whole_ids
from mae_jax.runtime import bounded_json, peers
from mae_jax.runtime.sharding import replicated, to_devices
from mae_jax.storage.file_kinds import unreadable
from mae_jax.storage.npz import opened


class Features:
    """The features of one split under a folder.

    Files 00000.npz ... have `features` float32 [n, D], `ids` [n] and `valid` [n]; complete.json has their number.
    """

    def __init__(self, folder: epath.Path, about: dict[str, Any]):
        """Args: folder; about, what the features are of, which must be that of those that are there."""
        self.folder, self.about = folder, bounded_json.as_read(about)

    def files(self) -> list[epath.Path]:
        """Returns the chunks that are there, in order."""
        # Not by a glob, for which the folder's own name would be a pattern too.
        return sorted(file for file in self.folder.iterdir() if file.name[0].isdigit() and file.suffix == ".npz")

    def compute(self, method: Method, params: Any, extras: Any, batches: Iterator[dict[str, np.ndarray]],
                mesh: Mesh) -> None:
        """Writes the chunks that are missing; what was made of a batch before is not computed again.

        Args:
          method, params, extras: the encoder.
          batches: the split's, this process's rows, as an evaluation sees them.
          mesh: which its devices share.
        """
        size = method.config.batch_size
        per_chunk = max(1, spherical_kmeans.CHUNK // size)
        encode = jax.jit(lambda params, extras, batch: (
            pool(method.encode(params, extras, batch), method.config.model.pool), batch["id"], batch["valid"] > 0),
            out_shardings=replicated(mesh))
        complete, parts, done, whole = self.folder / "complete.json", [], 0, False
        if jax.process_index() == 0:  # alone: to the others, the folder need not show yet
            self.folder.mkdir(parents=True, exist_ok=True)
            self._claim()
            done = len(self.files())
            whole = complete.is_file() and complete.read_text().strip() == str(done)
        done, whole = peers.broadcast([done, whole])
        if whole:
            return
        for number, batch in enumerate(batches):
            if number < done * per_chunk:
                continue
            values, ids, valid = jax.device_get(encode(params, extras, to_devices(batch, mesh, size)))
            ids = whole_ids(ids)
            parts.append(tuple(column[ids >= 0] for column in (values, ids, valid)))
            if len(parts) == per_chunk:
                self._write(done, parts)
                done, parts = done + 1, []
        if parts:
            self._write(done, parts)
        if jax.process_index() == 0:
            complete.write_text(json.dumps(len(self.files())) + "\n")
        peers.broadcast(None)  # the others wait until all is there

    def _claim(self) -> None:
        """Notes what the features are of; raises UserError where there are others."""
        file = self.folder / "about.json"
        content = file.read_bytes() if file.is_file() else None
        try:
            there = None if content is None else bounded_json.parse_object(content)
        except ValueError as error:
            raise UserError(f"{unreadable(file, content or b'', error)}; remove {self.folder}") from None
        if there is not None and there != self.about:
            differ = next(key for key in self.about if there.get(key) != self.about[key])
            raise UserError(f"{self.folder} has features of another {differ} ({there.get(differ)}, now "
                            f"{self.about[differ]}); name another folder, or remove it")
        if there is None:
            file.write_text(json.dumps(self.about) + "\n")

    def _write(self, number: int, parts: list[tuple[np.ndarray, ...]]) -> None:
        if jax.process_index():
            return
        features, ids, valid = (np.concatenate(column) for column in zip(*parts, strict=True))
        partial = self.folder / f"partial_{number:05d}.npz"
        with partial.open("wb") as file:
            np.savez(file, features=features.astype(np.float32), ids=ids, valid=valid)
        partial.replace(self.folder / f"{number:05d}.npz")

    def chunks(self, readable: bool = True) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (features [n, D], ids [n]) of the pictures that could be read, or of all; raises UserError."""
        for path in self.files():
            with opened(path, f"; remove {self.folder}") as stored:
                features, ids, valid = (stored[name] for name in ("features", "ids", "valid"))
            keep = valid if readable else np.ones(len(ids), bool)
            yield features[keep], ids[keep]

    def mean(self) -> np.ndarray:
        """Returns the mean of all features, float32 [D]."""
        total, count = 0.0, 0
        for values, _ in self.chunks():
            total, count = total + values.sum(0, dtype=np.float64), count + len(values)
        return (total / count).astype(np.float32)

    def points(self, mean: np.ndarray, readable: bool = True) -> Iterator[np.ndarray]:
        """Yields chunks of the features less their mean, scaled to length 1; of which pictures, see `chunks`."""
        for values, _ in self.chunks(readable):
            yield spherical_kmeans.unit(values - mean).astype(np.float32)

    def sample(self, count: int, mean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns at most `count` points, drawn from all chunks alike."""
        kept = np.zeros((0, len(mean)), np.float32)
        draws = np.zeros(0)
        for chunk in self.points(mean):
            draws = np.concatenate([draws, rng.random(len(chunk))])
            kept = np.concatenate([kept, chunk])
            lowest = np.sort(np.argsort(draws, kind="stable")[:count])
            draws, kept = draws[lowest], kept[lowest]
        return kept
