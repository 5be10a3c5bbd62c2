"""Probes of an encoder that is not trained further, whatever its method; `mae_jax transfer --protocols=quick`."""

from typing import Any

from mae_jax.errors import UserError
from mae_jax.evals import knn, linear_probe
from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context
from mae_jax.methods.base import Method


class FrozenProbes(Evaluation):
    """On features of whole images that are computed once: both probes of pre-training, and a layer trained by SGD.

    Its figure 'sgd/top1' is of the best of several learning rates.
    """

    name, when = "frozen_probes", "on_demand"

    def applies(self, method: Method, data: Any) -> bool:
        return method.task != "detection"  # whose images have objects, and no label

    def metric_names(self, method: Method, data: Any) -> list[str]:
        return ["linear/top1", "knn/top1", "sgd/top1"]

    def scalars(self, ctx: Context) -> dict[str, float]:
        """Raises UserError where there is nothing to probe."""
        config, classes = ctx.method.config, len(ctx.data.classes)
        train, test = (ctx.pooled(source) for source in (ctx.data.support, ctx.source))
        for split, (_, labels) in ((config.data.train_split, train), (config.data.eval_split, test)):
            if classes < 2 or not len(labels):
                raise UserError(f"the split {split!r} has no labels of several classes: nothing to probe")
        swept, _ = linear_probe.sweep(train, test, classes, seed=config.seed)
        neighbors = knn.top1(train, test, classes, config.eval.knn_k, config.eval.knn_temperature)
        return {"linear/top1": linear_probe.top1(train, test, classes), "knn/top1": neighbors, "sgd/top1": swept}
