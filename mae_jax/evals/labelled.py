"""How well a classifier does on a split: one label per picture, or any number of them."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mae_jax.evals import classify
from mae_jax.evals.rows import Rows
from mae_jax.methods import Method
from mae_jax.methods.base import Batch, Metrics
from mae_jax.metrics import Means
from mae_jax.ops.keys import stream_key
from mae_jax.sharding import replicated


def scores(method: Method, params: Any, extras: Any, batches: Iterable[Batch],
           mesh: Mesh) -> tuple[dict[str, float], np.ndarray | None]:
    """Returns the figures of `classify.summary` or of mean average precision, with the loss, and the confusions.

    Args:
      method: one that has `logits`.
      batches: global batches of a split, each example once; padding is not valid.

    Returns:
      name → figure, and the table of confusions int64 [C, C], None where there are many classes or labels.
    """
    means, total, rows = Means(), {}, Rows(mesh)
    for batch in batches:
        metrics, counts, logits = _judge(method, mesh)(params, extras, batch)
        means.add(jax.device_get(metrics))
        total = classify.add(total, jax.device_get(counts))
        if method.config.method.multi_label:
            rows.add(batch["valid"] > 0, logits, batch["labels"])
    figures = means.take()
    if not method.config.method.multi_label:
        return figures | (classify.summary(total) if total else {}), total.get("confusion")
    if not rows.parts:
        return figures, None
    logits, labels = rows.take()
    figures["map"] = classify.mean_ap(logits, labels, "voc11")
    figures["map_all"] = classify.mean_ap(logits, labels)
    return figures, None


def among_present(method: Method, params: Any, extras: Any, batches: Iterable[Batch], mesh: Mesh) -> float:
    """Returns top-1 among the classes that occur in the batches, as ImageNet-A and ImageNet-R are measured."""
    rows = Rows(mesh)
    for batch in batches:
        _, _, logits = _judge(method, mesh)(params, extras, batch)
        rows.add((batch["valid"] > 0) & (batch["label"] >= 0), logits, batch["label"])
    if not rows.parts:
        return float("nan")
    logits, labels = rows.take()
    return classify.subset_top1(logits, labels, np.unique(labels))


@functools.lru_cache(maxsize=8)
def _judge(method: Method, mesh: Mesh) -> Callable[..., tuple[Metrics, dict[str, jax.Array], jax.Array]]:
    """Returns the compiled function to metrics, counts and logits; kept from one evaluation to the next."""
    def judge(params: Any, extras: Any, batch: Batch) -> tuple[Metrics, dict[str, jax.Array], jax.Array]:
        logits = method.logits(params, extras, batch)
        key = stream_key(method.config.seed, 0, "evaluate")
        _, (metrics, _) = method.loss(params, extras, batch, key, 0, False)
        return metrics, classify.counts(logits, batch["label"], batch["valid"], method.classes), logits

    return jax.jit(judge, out_shardings=replicated(mesh))
