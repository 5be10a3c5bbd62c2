"""One evaluation: what a method is judged by on a split, and pictures."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mae_jax.data import cluster_ids
from mae_jax.errors import UserError
from mae_jax.evals import (
    attention_maps,
    classification,
    expert_routing,
    knn,
    linear_probe,
    reconstruction,
    segmentation,
)
from mae_jax.evals.accumulators import Means, Rows
from mae_jax.evals.linear_probe import Pair
from mae_jax.methods.base import Batch, Method, Metrics, pool
from mae_jax.rng import stream_key
from mae_jax.runtime import watchdog
from mae_jax.runtime.sharding import replicated, to_devices
from mae_jax.state import TrainState

PIXEL_LIMIT = 12_288  # values of a picture up to which raw pixels are probed as the floor (64 × 64 × 3)
Figures = dict[str, float]


class Evaluator:
    """Evaluates a train state on this run's data; compiled functions are kept between calls.

    Every process runs it; results are the same on all of them.
    """

    def __init__(self, method: Method, inputs: Any, mesh: Mesh):
        self.method, self.inputs, self.mesh = method, inputs, mesh
        self.parts = {"eval": inputs.evaluate, "val": inputs.validate}
        self.confusion: tuple[str, np.ndarray | None] = ("", None)  # part and table of the last figures of `scalars`
        self._batch = jax.jit(self._evaluate_batch, out_shardings=replicated(mesh))
        self._features = jax.jit(self._pooled, out_shardings=replicated(mesh))

    def _pooled(self, params: Any, extras: Any, batch: Batch) -> jax.Array:
        return pool(self.method.encode(params, extras, batch), self.method.config.model.pool)

    def _evaluate_batch(self, params: Any, extras: Any, batch: Batch) -> tuple[Metrics, jax.Array]:
        # The key is the same at every evaluation: what changes between two of them is the model.
        key = stream_key(self.method.config.seed, 0, "evaluate")
        _, (metrics, _) = self.method.loss(params, extras, batch, key, 0, False)
        return metrics, self._pooled(params, extras, batch)

    def _batches(self, source: Callable[..., Iterator[dict[str, np.ndarray]]], *args: Any) -> Iterator[Batch]:
        for batch in source(*args):
            watchdog.alive()
            yield to_devices(batch, self.mesh, self.method.config.batch_size)

    def scalars(self, state: TrainState, part: str = "eval") -> Figures:
        """Returns '<part>/<figure>' of a split: 'eval', or 'val', the validation part of the training data.

        Where parameters are averaged, the figures are those of the average; classifiers then have '<part>/raw/...' of
        the last ones too.
        """
        out: Figures = {}
        for name, params in self._weights(state, part):
            figures, confusion = self._scores(params, state.extras, self.parts[part])
            self.confusion = self.confusion if out else (part, confusion)
            out |= _named(name, figures)
        return out

    def names(self, state: TrainState) -> list[str]:
        """Returns what `scalars` gives of a part whose pictures have labels, from shapes alone."""
        def metrics(state: TrainState, batch: Batch) -> Metrics:
            return self.method.loss(state.params, state.extras, batch, jax.random.key(0), 0, False)[1][0]

        names = list(jax.eval_shape(metrics, state, self.method.eval_spec()))
        if hasattr(self.method, "logits"):
            one = ["top1", "mean_per_class", *["top5"] * (self.method.classes > 5)]
            names += ["map", "map_all"] if self.method.config.method.multi_label else one
            return names + [f"raw/{name}" for name in names] * bool(state.ema)
        if hasattr(self.method, "pixel_logits"):
            return [*names, "miou"]
        return names + ["linear/top1", "knn/top1"] * (len(self.inputs.classes) > 1)

    def _weights(self, state: TrainState, part: str) -> list[tuple[str, Any]]:
        """Returns what to call figures of a part → parameters that they are of, the main ones first."""
        raw = [(f"{part}/raw", state.params)] if state.ema and hasattr(self.method, "logits") else []
        return [(part, state.ema or state.params), *raw]

    def _scores(self, params: Any, extras: Any, source: Callable[..., Iterator[Any]],
                *args: Any) -> tuple[Figures, np.ndarray | None]:
        batches = self._batches(source, *args)
        if hasattr(self.method, "logits"):
            return classification.scores(self.method, params, extras, batches, self.mesh)
        if hasattr(self.method, "pixel_logits"):
            return segmentation.scores(self.method, params, extras, batches), None
        return self._frozen(params, extras, batches), None

    def _frozen(self, params: Any, extras: Any, batches: Iterator[Batch]) -> Figures:
        """Returns the held-out loss, and where labels exist the top-1 of a linear probe and of k-NN, all in 0..1."""
        means, held, chosen = Means(), Rows(self.mesh), Rows(self.mesh)
        for batch in batches:
            metrics, features = self._batch(params, extras, batch)
            means.add(jax.device_get(metrics))
            held.add(labelled_rows(batch), features, batch["label"])
            if cluster_ids.FIELD in batch:
                chosen.add(batch["valid"] > 0, batch[cluster_ids.FIELD], batch["label"])
        out, test = means.take(), _pair(held)
        if chosen.parts:
            out |= expert_routing.figures(self.method, params, extras, *chosen.take())
        if not self._probed(test):
            return out
        train = self._pooled_pair(params, extras, self.inputs.support)
        return out | (self._probes(train, test, "top1") if len(train[1]) else {})

    def quick(self, state: TrainState) -> Figures:
        """Returns the probes of an encoder, whatever its method, on features of whole pictures that are computed once.

        Besides those of every evaluation, 'eval/sgd/top1', a layer trained at the best of several learning rates.
        """
        params = state.ema or state.params
        train, test = (self._pooled_pair(params, state.extras, source)
                       for source in (self.inputs.support, self.inputs.evaluate))
        if not self._probed(test):
            raise UserError(f"data.eval_split={self.method.config.data.eval_split!r} has no labels of several classes: "
                            "nothing to probe")
        swept, _ = linear_probe.sweep(train, test, len(self.inputs.classes), seed=self.method.config.seed)
        return _named("eval", self._probes(train, test, "top1") | {"sgd/top1": swept})

    def _probed(self, test: Pair) -> bool:
        """Says whether there is something to probe: classes, and held-out pictures that have one."""
        return len(self.inputs.classes) > 1 and len(test[1]) > 0

    def _probes(self, train: Pair, test: Pair, name: str) -> Figures:
        classes, c = len(self.inputs.classes), self.method.config.eval
        return {f"linear/{name}": linear_probe.top1(train, test, classes),
                f"knn/{name}": knn.top1(train, test, classes, c.knn_k, c.knn_temperature)}

    def _pooled_pair(self, params: Any, extras: Any, source: Callable[[], Iterator[Any]]) -> Pair:
        """Returns (features [n, D], labels [n]) of the labelled pictures, under the evaluation's preprocessing."""
        rows = Rows(self.mesh)
        for batch in self._batches(source):
            rows.add(labelled_rows(batch), self._features(params, extras, batch), batch["label"])
        return _pair(rows)

    def closing(self, state: TrainState) -> Figures:
        """Returns what is measured once, at the end of a run: other crops, further test sets, attention's overlap."""
        extras, config = state.extras, self.method.config
        out: Figures = {}
        if not config.data.eval_split:
            return out
        for part, params in self._weights(state, "eval"):
            for ratio in config.eval.crop_ratio[1:]:
                figures, _ = self._scores(params, extras, self.inputs.evaluate, ratio)
                out |= _named(f"{part}/crop_{ratio:g}", figures)
            for name in config.eval.sets if hasattr(self.method, "logits") else ():
                batches = self._batches(self.inputs.extra, name)
                top1 = classification.among_present(self.method, params, extras, batches, self.mesh)
                out[f"{part}/{name.replace(':', '/')}/top1"] = top1
        if hasattr(self.method, "pixel_logits"):
            chosen_on = self.inputs.validate if config.data.val_split else self.inputs.support
            choose, test = (self._batches(source) for source in (chosen_on, self.inputs.evaluate))
            e = config.eval
            out |= _named("eval", attention_maps.iou(self.method, state, choose, test, e.attention_block,
                                                     e.attention_query))
        return out

    def pixel_floor(self, part: str) -> Figures:
        """Returns the probes of raw pixels, which a learned feature must beat; {} where features are not probed."""
        large = np.prod(self.method.config.data.image_size) * 3 > PIXEL_LIMIT
        trained = hasattr(self.method, "logits") or hasattr(self.method, "pixel_logits")
        if large or trained or len(self.inputs.classes) < 2:
            return {}
        sets = []
        for source in (self.inputs.support, self.parts[part]):
            rows = Rows(self.mesh)
            for batch in self._batches(source):
                rows.add(labelled_rows(batch), batch["patches"], batch["order"], batch["label"])
            patches, order, labels = rows.take()
            sets.append((self._raster(patches, order), labels))
        return _named(part, self._probes(*sets, "pixels_top1")) if self._probed(sets[1]) else {}

    def _raster(self, patches: np.ndarray, order: np.ndarray) -> np.ndarray:
        pictures = self.method.grid.unpatchify(patches, order)
        return pictures.reshape(len(pictures), np.prod(pictures.shape[1:])).astype(np.float32) / 255

    def pictures(self, state: TrainState, part: str = "eval") -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, uint8 picture): what the method makes of pictures, and where its encoder looks."""
        batch = next(self._batches(self.parts[part]), None)
        if batch is None:
            return
        method, config = self.method, self.method.config
        count = min(max(config.eval.pictures // method.group, 1) * method.group, config.batch_size)
        everywhere = partial(jax.device_put, device=replicated(self.mesh))
        batch = {name: everywhere(value)[:count] for name, value in batch.items()}
        about = method, state.ema or state.params, state.extras, batch
        if cluster_ids.FIELD in method.encodes_with:
            yield "experts", expert_routing.picture(*about[:3], self._batches(self.parts[part]))
        if method.group > 1:
            yield "reconstruct", reconstruction.mixtures(*about)
        elif hasattr(method, "reconstruct"):
            yield "reconstruct", reconstruction.reconstructions(*about)
            yield "ratios", reconstruction.at_ratios(*about)
        if hasattr(method, "pixel_logits"):
            yield "segment", segmentation.pictures(*about)
        shown, confusion = self.confusion
        if confusion is not None:
            yield "confusion", classification.confusion_picture(confusion, self.inputs.classes, shown)
        yield "attention", attention_maps.picture(*about, config.eval.attention_block, config.eval.attention_query)


def _named(part: str, figures: Figures) -> Figures:
    return {f"{part}/{name}": value for name, value in figures.items()}


def _pair(rows: Rows) -> Pair:
    """Returns (features [n, D], labels [n]) of rows; no labels where there are no rows."""
    features, labels = rows.take() if rows.parts else (np.zeros((0, 0)), np.zeros(0, np.int32))
    return features, labels


def labelled_rows(batch: Batch) -> jax.Array:
    """Returns bool [B]: which rows are pictures with a label, and neither padding nor grey stand-ins."""
    return (batch["valid"] > 0) & (batch["label"] >= 0)
