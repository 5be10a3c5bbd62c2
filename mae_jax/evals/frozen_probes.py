"""Probes of a frozen encoder of any method; used by `mae_jax transfer --protocols=quick`."""

from typing import Any

from mae_jax.errors import UserError
from mae_jax.evals import knn, linear_probe
from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context
from mae_jax.methods.base import Method


class FrozenProbes(Evaluation):
    """Linear probe, k-NN probe and a linear layer trained by SGD, all on the same features of unmasked images.

    'sgd/top1' is that of the learning rate chosen by `linear_probe.sweep`.
    """

    name, when = "frozen_probes", "on_demand"

    def applies(self, method: Method, data: Any) -> bool:
        return method.task != "detection"  # its images have objects instead of labels

    def metric_names(self, method: Method, data: Any) -> list[str]:
        return ["linear/top1", "knn/top1", "sgd/top1"]

    def scalars(self, ctx: Context) -> dict[str, float]:
        """See `Evaluation.scalars`; raises UserError for a split without labels of several classes."""
        config, classes = ctx.method.config, len(ctx.data.classes)
        train, test = (ctx.pooled(source) for source in (ctx.data.support, ctx.source))
        for split, (_, labels) in ((config.data.train_split, train), (config.data.eval_split, test)):
            if classes < 2 or not len(labels):
                raise UserError(f"the split {split!r} has no labels of at least two classes: there is nothing to probe")
        swept, _ = linear_probe.sweep(train, test, classes, seed=config.seed)
        neighbors = knn.top1(train, test, classes, config.eval.knn_k, config.eval.knn_temperature)
        return {"linear/top1": linear_probe.top1(train, test, classes), "knn/top1": neighbors, "sgd/top1": swept}
