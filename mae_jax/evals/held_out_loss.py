"""The loss on held-out images, and its terms."""

from typing import Any

import jax

from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context
from mae_jax.methods.base import Batch, Method, Metrics


class HeldOutLoss(Evaluation):
    """The means of all metrics of the method's loss, without augmentation of the images."""

    name = "held_out_loss"

    def metric_names(self, method: Method, data: Any) -> list[str]:
        def metrics(batch: Batch, held_out: Batch) -> Metrics:
            params, extras = method.init(jax.random.key(0), batch)
            return method.loss(params, extras, held_out, jax.random.key(0), 0, False)[1][0]

        return list(jax.eval_shape(metrics, method.batch_spec(), method.eval_spec()))

    def scalars(self, ctx: Context) -> dict[str, float]:
        return dict(ctx.held_out.losses)
