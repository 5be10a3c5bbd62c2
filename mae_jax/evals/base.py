"""What an evaluation is: when it applies, what its metrics are called, its figures and its images."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from ml_collections import ConfigDict

from mae_jax.evals.context import Context, Pair
from mae_jax.methods.base import Batch, Method

When = Literal["first", "periodic", "final", "on_demand"]


class Evaluation:
    """Base of all evaluations. An instance holds no state: it is shared by all runs of a process.

    Attributes:
      name: unique in the table of `mae_jax.evals.evaluator`.
      when: 'first': once, before the first step; 'periodic': every eval.every, and of each crop of eval.crop_ratio at
        the end; 'final': once, at the end of a run; 'on_demand': where a command asks for it by name.
    """

    name: ClassVar[str]
    when: ClassVar[When] = "periodic"
    of_crops: ClassVar[bool] = True  # whether its figures change with the crop of eval.crop_ratio

    def applies(self, method: Method, data: Any) -> bool:
        """Says whether a method is evaluated by this on `data.Inputs`; all that follows is called only then."""
        return True

    def metric_names(self, method: Method, data: Any) -> list[str]:
        """Returns the names that `scalars` gives of a part with labelled images, without 'eval/', from shapes alone."""
        return []

    def counts(self, method: Method, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Returns tables of whole numbers of a batch, whose sums over the part are `ctx.held_out.counts`; jitted.

        Those of evaluations of another `when` are not counted.

        Args:
          method: what is evaluated.
          outputs: features [B, D] of pre-training, logits [B, C], or [B, height, width, C] of pixels.
          batch: the global batch; padding is not valid.
        """
        return {}

    def scalars(self, ctx: Context) -> dict[str, float]:
        """Returns name → figure, NaN for what is none; called on every process, and the same on all of them."""
        return {}

    def files(self, ctx: Context) -> Iterator[tuple[str, str]]:
        """Yields (name, text) of files in the workdir, which are written anew each time, after `scalars`."""
        yield from ()

    def images(self, ctx: Context) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, uint8 [height, width, 3]): PNGs of a periodic evaluation, after `scalars`, on every process.

        `ctx.shown` has the images to show; there is at least one.
        """
        yield from ()


class Probe(Evaluation):
    """Base of probes: top-1 of the held-out images of pre-training by frozen features of the training split.

    Attributes:
      metric: what it is called, without 'eval/'.
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
        """Returns the top-1 of `test`, read once, in 0..1; c: the group `eval`."""
        raise NotImplementedError
