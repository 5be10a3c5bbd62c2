"""The context that evaluations share: a state, a part of the data, and results that are computed once from both."""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from mae_jax.data import cluster_ids
from mae_jax.errors import UserError
from mae_jax.evals import detected, input_grid
from mae_jax.evals.accumulators import HostRows, Means, add
from mae_jax.methods.base import Batch, Method, Metrics, pool
from mae_jax.ops import example_ids
from mae_jax.rng import stream_key
from mae_jax.runtime import progress, watchdog
from mae_jax.runtime.sharding import replicated, to_devices

Value = TypeVar("Value")
Pair = tuple[np.ndarray, np.ndarray]  # features [n, D], labels [n]
Source = Callable[[], Iterator[dict[str, np.ndarray]]]  # opens a part of the data: host batches, the last one padded


class Counter(Protocol):
    """The interface of an evaluation that a pass over a part uses."""

    name: ClassVar[str]

    def counts(self, method: Method, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """See `Evaluation.counts`."""


class Pass(NamedTuple):
    """Results of one pass over the evaluated part, the same on every host; the n rows are its valid images, in order.

    Attributes:
      losses: name → mean of each metric of the loss.
      counts: name → int64 sum of the counts of evaluations; {} without a batch.
      rows: name → array. For pre-training, `features` float32 [n, D], `label` int32 [n] and, where batches have it,
        `cluster` int32 [n]; for multi-label data, `logits` float32 [n, C] and `labels` uint8 [n, C]; for detection,
        `detections`, n times a `Detected`; {} for other tasks and without a batch.
    """

    losses: dict[str, float]
    counts: dict[str, np.ndarray]
    rows: dict[str, Any]


class Context:
    """The inputs of an evaluation. Cached properties are computed once, on first access.

    Every process creates the same contexts in the same order, since computations use all devices.

    Attributes:
      method: the evaluated method.
      params, extras: the state of the method. With averaged parameters, `params` are the average or, in a separate
        context, the last parameters.
      data: `data.Inputs` of the run.
      mesh: the devices.
      part: name of the evaluated part, for titles: 'eval', or 'val' for the validation part of the training data.
      source: opens that part.
      notes: evaluation name → values that its `scalars` stores for its `images`.
    """

    def __init__(self, method: Method, params: Any, extras: Any, data: Any, mesh: Mesh, part: str, source: Source,
                 counting: tuple[Counter, ...] = (), notes: dict[str, Any] | None = None):
        """Args: as the attributes; counting: evaluations whose `counts` are summed in the pass over the part."""
        self.method, self.params, self.extras, self.data, self.mesh = method, params, extras, data, mesh
        self.part, self.source, self.counting = part, source, counting
        self.notes = {} if notes is None else notes

    def batches(self, source: Source | None = None) -> Iterator[Batch]:
        """Yields global batches of the evaluated part, or of `source`, on the devices; `valid` is 0 for padding."""
        for batch in (source or self.source)():
            watchdog.heartbeat()
            yield to_devices(batch, self.mesh, self.method.config.batch_size)
            there = int((example_ids.whole(batch["id"]) >= 0).sum())  # padding has no id
            progress.advance(there * jax.process_count())

    @cached_property
    def held_out(self) -> Pass:
        """The results of the pass over the evaluated part."""
        means, rows = Means(), HostRows(self.mesh)
        finds: list[detected.Detected] = []
        sums: dict[str, np.ndarray] = {}
        names: tuple[str, ...] = ()
        measure = compiled_measure(self.method, self.mesh, self.counting)
        for batch in self.batches():
            metrics, counts, outputs = measure(self.params, self.extras, batch)
            means.add(jax.device_get(metrics))
            sums = add(sums, jax.device_get(counts))
            kept = self._kept(batch, outputs)
            if self.method.task == "detection":  # 28 x 28 masks of all images would need too much memory
                whole = rows.whole(batch["valid"] > 0, *kept.values())
                finds += detected.compact(dict(zip(kept, whole, strict=True)))
                continue
            names = tuple(kept)
            if kept:
                rows.add(batch["valid"] > 0, *kept.values())
        if finds:
            return Pass(means.pop(), sums, {"detections": finds})
        return Pass(means.pop(), sums, dict(zip(names, rows.collect(), strict=True)) if names else {})

    def _kept(self, batch: Batch, outputs: Any) -> dict[str, jax.Array]:
        """Returns the arrays [B, ...] of a batch that go into `Pass.rows`."""
        if outputs is None:
            return {}
        if self.method.task == "pretraining":
            fields = ("label", cluster_ids.FIELD)
            return {"features": outputs} | {name: batch[name] for name in fields if name in batch}
        if self.method.task == "detection":
            return {**outputs, **{name: batch[name] for name in detected.FIELDS}}
        several = self.method.task == "classification" and self.method.multi_label
        return {"logits": outputs, "labels": batch["labels"]} if several else {}

    @cached_property
    def probed(self) -> tuple[Pair, Pair] | None:
        """(features, labels) of the labeled images of the training split, and of those of the evaluated part.

        None if one of the two has no labeled image.
        """
        rows = self.held_out.rows
        known = rows["label"] >= 0 if rows else np.zeros(0, bool)
        if not known.any():
            return None
        train = self.pooled(self.data.support)
        return (train, (rows["features"][known], rows["label"][known])) if len(train[1]) else None

    def pooled(self, source: Source) -> Pair:
        """Returns (features, labels) of the labeled images of a part, for any method; does not compute the loss."""
        return self._labeled(source, _features(self.method, self.mesh))

    def logits(self, source: Source) -> Pair:
        """Returns (logits float32 [n, C], labels int32 [n]) of the labeled images of a part, for classification."""
        return self._labeled(source, _logits(self.method, self.mesh))

    def _labeled(self, source: Source, outputs_of: Callable[..., jax.Array]) -> Pair:
        rows = HostRows(self.mesh)
        for batch in self.batches(source):
            rows.add(labeled_rows(batch), outputs_of(self.params, self.extras, batch), batch["label"])
        found, labels = rows.collect() if rows.parts else (np.zeros((0, 0)), np.zeros(0, np.int32))
        return found, labels

    @cached_property
    def shown(self) -> Batch | None:
        """The first eval.pictures images of the part, replicated on every device; None for a part without images.

        Whole groups of mixed images are kept, and so padding can be among them.
        """
        batch = next(self.batches(), None)
        if batch is None:
            return None
        config, group = self.method.config, self.method.group
        whole = {name: jax.device_put(value, replicated(self.mesh)) for name, value in batch.items()}
        there = int((example_ids.whole(jax.device_get(whole["id"])) >= 0).sum())  # padding comes last
        count = min(max(min(config.eval.pictures, there) // group, 1) * group, config.batch_size)
        return {name: value[:count] for name, value in whole.items()}


    @cached_property
    def shown_names(self) -> list[str]:
        """Captions of the images of `shown`: name and classes."""
        if self.shown is None:
            return []
        data = self.method.config.data
        part = self.data.parts.get(data.eval_split if self.part == "eval" else data.val_split)
        batch = jax.device_get({name: value for name, value in self.shown.items() if "patches" not in name})
        lines = [input_grid.caption(batch, i, self.data.classes, part) for i in range(len(batch["id"]))]
        return [f"{name} ({classes})" if classes else name for name, classes in lines]


def labeled_rows(batch: Batch) -> jax.Array:
    """Returns bool [B]: rows with a labeled image; False for padding and gray substitutes of unreadable images."""
    return (batch["valid"] > 0) & (batch["label"] >= 0)


def pooled_features(method: Method, params: Any, extras: Any, batch: Batch) -> jax.Array:
    """Returns the pooled features of unmasked images, float32 [B, D]."""
    return pool(method.encode(params, extras, batch), method.config.model.pool)


@functools.lru_cache(maxsize=8)
def _features(method: Method, mesh: Mesh) -> Callable[..., jax.Array]:
    """Returns the compiled `pooled_features`, cached across evaluations."""
    return jax.jit(functools.partial(pooled_features, method), out_shardings=replicated(mesh))


@functools.lru_cache(maxsize=8)
def _logits(method: Method, mesh: Mesh) -> Callable[..., jax.Array]:
    """Returns the compiled `logits` of a classification method, cached across evaluations."""
    of_classifier: Any = method
    return jax.jit(of_classifier.logits, out_shardings=replicated(mesh))


@functools.lru_cache(maxsize=8)
def compiled_measure(method: Method, mesh: Mesh, counting: tuple[Counter, ...]) -> Any:
    """Returns the compiled `measure`, (params, extras, batch) → its result, cached across evaluations."""
    return jax.jit(functools.partial(measure, method, counting), out_shardings=replicated(mesh))


def measure(method: Method, counting: tuple[Counter, ...], params: Any, extras: Any, batch: Batch
            ) -> tuple[Metrics, dict[str, jax.Array], jax.Array | None]:
    """Returns the metrics of the loss, the counts and the outputs of a batch; jitted.

    Outputs are pooled features float32 [B, D] for pre-training, logits float32 [B, C] for classification, the result of
    `detections` for detection; None for segmentation, whose logits of all pixels are too large.
    """
    outputs_of = {"pretraining": pooled_features, "classification": lambda m, *args: m.logits(*args),
                  "segmentation": lambda m, *args: m.pixel_logits(*args),
                  "detection": lambda m, *args: m.detections(*args)}[method.task]
    # All evaluations use the same key, so that only the model differs between them.
    key = stream_key(method.config.seed, 0, "evaluate")
    no_step: Any = 0  # a Python number, and so a constant of the compiled function
    _, (metrics, _) = method.loss(params, extras, batch, key, no_step, False)
    outputs = outputs_of(method, params, extras, batch)
    counts = united("count", ((each.name, each.counts(method, outputs, batch)) for each in counting))
    return metrics, counts, None if method.task == "segmentation" else outputs


def united(what: str, given: Iterable[tuple[str, Mapping[str, Value]]], own: Collection[str] = ()) -> dict[str, Value]:
    """Merges the results of several evaluations.

    Args:
      what: kind of the values, for the message.
      given: (name of the evaluation, name → value) of each evaluation.
      own: names of evaluations that may replace a value of an earlier one of these.

    Raises:
      UserError: two evaluations return the same name.
    """
    values: dict[str, Value] = {}
    givers: dict[str, str] = {}
    for giver, those in given:
        for name, value in those.items():
            if name in givers and not (givers[name] in own and giver in own):
                raise UserError(f"the evaluations {givers[name]!r} and {giver!r} both return the {what} {name!r}; "
                                "rename one")
            values[name], givers[name] = value, giver
    return values
