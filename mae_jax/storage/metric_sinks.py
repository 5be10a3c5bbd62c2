"""Metric sinks: where scalars and figures go besides metrics.jsonl."""

from typing import ClassVar

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax import plugins

SINKS = {  # name → module:class
    "pictures": "mae_jax.storage.png_files:PngFiles",
    "tensorboard": "mae_jax.storage.tensorboard:TensorBoard",
    "wandb": "mae_jax.storage.weights_and_biases:WeightsAndBiases",
}
LOOP_RETRY_SECONDS = 5.0  # seconds in which a failing bucket is tried again while the loop waits


class Sink:
    """Base of all sinks, made without arguments; process 0 alone has any. All does nothing but what is overridden.

    Whatever a method raises is a warning, after which the sink is not called again: no metric is worth a run.

    Attributes:
      what: what it writes, for that warning.
    """

    what: ClassVar[str] = "metrics"

    def open(self, workdir: epath.Path, restored_step: float) -> None:
        """Called once, first.

        Args:
          workdir: of the run, local or in a bucket.
          restored_step: of the checkpoint that the run goes on from, 0 of a new one: later steps come again. Infinite
            where a finished or running workdir is evaluated: no step does.
        """

    def write_config(self, fields: dict[str, bool | int | float | str]) -> None:
        """Writes dotted config field → value, a tuple as its text; called at each start of a run, after `open`."""

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes name → number of a step, which may be NaN; more of the same step may follow."""

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a figure, uint8 [height, width, 3]."""

    def flush(self) -> None:
        """Called at every checkpoint: what was written shall outlive the process."""

    def close(self) -> None:
        """Called once, last."""


def find(name: str) -> type[Sink]:
    """Returns the class of a sink; raises UserError with the nearest name."""
    found: type[Sink] = plugins.find("metric_sinks", name, SINKS, "log.sinks")
    return found


def names(log: ConfigDict) -> tuple[str, ...]:
    """Returns the sinks that a config's group `log` asks for; a workdir always has its pictures."""
    return tuple(dict.fromkeys(("pictures", *("tensorboard",) * log.tensorboard, *log.sinks)))
