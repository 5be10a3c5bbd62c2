"""The interface of evaluations: when one applies, the names of its metrics, its scalars, files and images."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from ml_collections import ConfigDict

from mae_jax.evals.context import Context, Pair
from mae_jax.methods.base import Batch, Method

When = Literal["periodic", "last", "final", "on_demand"]


class Evaluation:
    """Base class of evaluations. Instances are stateless and shared by all runs of a process.

    Attributes:
      name: unique name in the table of `mae_jax.evals.evaluator`.
      when: 'periodic': every eval.every, and for each crop of eval.crop_ratio at the end; 'last': with the last
        periodic evaluation, on the same part; 'final': at the end of a run, on data.eval_split; 'on_demand': when a
        command requests it by name.
      of_crops: whether the metrics depend on the crop of eval.crop_ratio.
    """

    name: ClassVar[str]
    when: ClassVar[When] = "periodic"
    of_crops: ClassVar[bool] = True

    def applies(self, method: Method, data: Any) -> bool:
        """Returns whether the evaluation applies to a method and `data.Inputs`; other methods are called only if so."""
        return True

    def metric_names(self, method: Method, data: Any) -> list[str]:
        """Returns the keys of `scalars` for a part with labeled images, without 'eval/', computed from shapes only."""
        return []

    def counts(self, method: Method, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Returns name → integer array of counts of a batch; jitted. `ctx.held_out.counts` has the sums over the part.

        Called only for evaluations of the `when` that is being run.

        Args:
          method: the evaluated method.
          outputs: pooled features [B, D] for pre-training, logits [B, C] for classification, logits [B, height, width,
            C] for segmentation, or the arrays of `Detection.detections`.
          batch: the global batch; `valid` is 0 for padding.
        """
        return {}

    def scalars(self, ctx: Context) -> dict[str, float]:
        """Returns name → metric, NaN where undefined. Called on every process, with the same result on all of them."""
        return {}

    def files(self, ctx: Context) -> Iterator[tuple[str, str]]:
        """Yields (name, text) of files for the workdir, which replace those of earlier evaluations; after `scalars`."""
        yield from ()

    def images(self, ctx: Context) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, image uint8 [height, width, 3]) of a periodic evaluation; on every process, after `scalars`.

        `ctx.shown` has the images to show, at least one.
        """
        yield from ()


class Probe(Evaluation):
    """Base class of probes of pre-training: fit on frozen features of the training split, top-1 on held-out images.

    Attributes:
      metric: name of the metric, without 'eval/'.
    """

    metric: ClassVar[str]

    def applies(self, method: Method, data: Any) -> bool:
        return method.task == "pretraining" and len(data.classes) > 1

    def metric_names(self, method: Method, data: Any) -> list[str]:
        return [self.metric]

    def scalars(self, ctx: Context) -> dict[str, float]:
        if not ctx.probed:
            return {}
        return {self.metric: self.accuracy(*ctx.probed, len(ctx.data.classes), ctx.method.config.eval)}

    def accuracy(self, train: Pair, test: Pair, classes: int, c: ConfigDict) -> float:
        """Returns the top-1 accuracy on `test` in 0..1.

        Args:
          train, test: features float32 [n, D] and labels int32 [n]; `test` is used once.
          classes: number of classes.
          c: the config group `eval`.
        """
        raise NotImplementedError
