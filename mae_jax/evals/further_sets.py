"""Top-1 on further test sets, such as ImageNet-A, -R, -Sketch and V2."""

from functools import partial
from typing import Any

import numpy as np

from mae_jax.evals.base import Evaluation
from mae_jax.evals.classification import subset_top1
from mae_jax.evals.context import Context, Source
from mae_jax.methods.base import Method


class FurtherSets(Evaluation):
    """Top-1 of each set of eval.sets among the classes that occur in it, the protocol of ImageNet-A and ImageNet-R."""

    name, when = "further_sets", "final"

    def applies(self, method: Method, data: Any) -> bool:
        return method.task == "classification"

    def metric_names(self, method: Method, data: Any) -> list[str]:
        return [_metric(name) for name in method.config.eval.sets]

    def scalars(self, ctx: Context) -> dict[str, float]:
        return {_metric(name): among_present(ctx, partial(ctx.data.extra, name))
                for name in ctx.method.config.eval.sets}


def _metric(name: str) -> str:
    return f"{name.replace(':', '/')}/top1"


def among_present(ctx: Context, source: Source) -> float:
    """Returns top-1 among the classes that occur in a part of the data; NaN for a part without labeled images."""
    logits, labels = ctx.logits(source)
    return subset_top1(logits, labels, np.unique(labels)) if len(labels) else float("nan")
