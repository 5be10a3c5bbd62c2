"""One evaluation: held-out loss, probes on frozen features, pictures."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mae_jax.evals import knn, linear, reconstruct
from mae_jax.methods import Method
from mae_jax.methods.base import Batch, Metrics
from mae_jax.metrics import Means
from mae_jax.ops.patches import assemble, grid
from mae_jax.sharding import replicated, to_devices
from mae_jax.step import TrainState, stream_key

PIXEL_LIMIT = 12_288  # values of a picture up to which raw pixels are probed as the floor (64 × 64 × 3)


def pool(tokens: jax.Array, how: str) -> jax.Array:
    """Pools tokens [B, 1 + N, D], class token first, to float32 features [B, D]: 'cls' or 'mean' of the patches."""
    return (tokens[:, 0] if how == "cls" else tokens[:, 1:].mean(1)).astype(jnp.float32)


class Rows:
    """Collects rows of batches on the host and drops those that are padding, replaced by grey, or unlabelled."""

    def __init__(self, mesh: Mesh):
        self.sharding, self.parts = replicated(mesh), []

    def add(self, batch: Batch, *arrays: jax.Array) -> None:
        gathered = jax.device_put((*arrays, batch["label"], batch["valid"]), self.sharding)
        *rows, labels, valid = jax.device_get(gathered)
        keep = (valid > 0) & (labels >= 0)
        self.parts.append([x[keep] for x in (*rows, labels)])

    def take(self) -> list[np.ndarray]:
        """Returns the arrays that were added, row by row, and the labels last."""
        return [np.concatenate(column) for column in zip(*self.parts, strict=True)]


class Evaluator:
    """Evaluates a train state on this run's data; compiled functions are kept between calls.

    Every process runs it; results are the same on all of them.
    """

    def __init__(self, method: Method, inputs: Any, mesh: Mesh):
        self.method, self.inputs, self.mesh = method, inputs, mesh
        self._batch = jax.jit(self._evaluate_batch, out_shardings=replicated(mesh))
        self._features = jax.jit(self._pooled, out_shardings=replicated(mesh))

    def _pooled(self, state: TrainState, batch: Batch) -> jax.Array:
        params = state.ema or state.params
        return pool(self.method.encode(params, state.extras, batch), self.method.config.model.pool)

    def _evaluate_batch(self, state: TrainState, batch: Batch) -> tuple[Metrics, jax.Array]:
        # The key is the same at every evaluation: what changes between two of them is the model.
        key = stream_key(self.method.config.seed, 0, "evaluate")
        _, (metrics, _) = self.method.loss(state.ema or state.params, state.extras, batch, key, state.step, False)
        return metrics, self._pooled(state, batch)

    def _batches(self, source: Callable[[], Iterator[dict[str, np.ndarray]]]) -> Iterator[Batch]:
        for batch in source():
            yield to_devices(batch, self.mesh, self.method.config.batch_size)

    def scalars(self, state: TrainState) -> dict[str, float]:
        """Returns eval/loss, and where labels exist the top-1 of a linear probe and of k-NN, all in 0..1."""
        means, held = Means(), Rows(self.mesh)
        for batch in self._batches(self.inputs.evaluate):
            metrics, features = self._batch(state, batch)
            means.add(jax.device_get(metrics))
            held.add(batch, features)
        out = means.take("eval/")
        if not held.parts:
            return out
        test = tuple(held.take())
        return out | self._probes(self.features(state), test, "top1") if self._labelled(test) else out

    def _labelled(self, test: tuple[np.ndarray, np.ndarray]) -> bool:
        """Says whether there is something to probe: classes, and held-out pictures that have one."""
        return len(self.inputs.classes) > 1 and len(test[1]) > 0

    def _probes(self, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray],
                name: str) -> dict[str, float]:
        classes, settings = len(self.inputs.classes), self.method.config.eval
        return {f"eval/linear/{name}": linear.top1(train, test, classes),
                f"eval/knn/{name}": knn.top1(train, test, classes, settings.knn_k, settings.knn_temperature)}

    def features(self, state: TrainState) -> tuple[np.ndarray, np.ndarray]:
        """Returns (features [n, D], labels [n]) of the training split under the evaluation's preprocessing."""
        support = Rows(self.mesh)
        for batch in self._batches(self.inputs.support):
            support.add(batch, self._features(state, batch))
        features, labels = support.take()
        return features, labels

    def pixel_floor(self) -> dict[str, float]:
        """Returns the probes of raw pixels, which a learned feature must beat; {} for large or unlabelled pictures."""
        large = np.prod(self.method.config.data.image_size) * 3 > PIXEL_LIMIT
        if large or not self.inputs.num_eval or len(self.inputs.classes) < 2:
            return {}
        sets = []
        for source in (self.inputs.support, self.inputs.evaluate):
            rows = Rows(self.mesh)
            for batch in self._batches(source):
                rows.add(batch, batch["patches"], batch["order"])
            patches, order, labels = rows.take()
            sets.append((self._raster(patches, order), labels))
        return self._probes(*sets, "pixels_top1") if self._labelled(sets[1]) else {}

    def _raster(self, patches: np.ndarray, order: np.ndarray) -> np.ndarray:
        config = self.method.config
        pictures = assemble(patches, order, grid(config), tuple(config.model.patch))
        return pictures.reshape(len(pictures), np.prod(pictures.shape[1:])).astype(np.float32) / 255

    def pictures(self, state: TrainState) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, uint8 picture): reconstructions, and one picture at several masking ratios."""
        if not hasattr(self.method, "reconstruct"):
            return
        batch = next(self._batches(self.inputs.evaluate), None)
        if batch is None:
            return
        count = min(self.method.config.eval.pictures, self.method.config.batch_size)
        everywhere = partial(jax.device_put, device=replicated(self.mesh))
        batch = {name: everywhere(value)[:count] for name, value in batch.items()}
        params = state.ema or state.params
        yield "reconstruct", reconstruct.reconstructions(self.method, params, state.extras, batch)
        yield "ratios", reconstruct.at_ratios(self.method, params, state.extras, batch)
