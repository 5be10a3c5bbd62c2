"""Metric sinks: the outputs of scalars and figures besides metrics.jsonl."""

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
LOOP_RETRY_SECONDS = 5.0  # seconds of retries of a failing bucket while the training loop waits


class Sink:
    """Base of all sinks, whose methods do nothing. Sinks are created without arguments, on process 0 only.

    If a method raises any exception, a warning is logged and the sink is dropped: a metric must not end a run.

    Attributes:
      what: description of the output, for that warning.
    """

    what: ClassVar[str] = "metrics"

    def open(self, workdir: epath.Path, restored_step: float) -> None:
        """Opens the output; called once, before all other methods.

        Args:
          workdir: of the run, local or in a bucket.
          restored_step: step of the checkpoint that the run resumes from, 0 for a new run; later steps are written
            again. Infinite for an evaluation of a workdir, which repeats no step.
        """

    def write_config(self, fields: dict[str, bool | int | float | str]) -> None:
        """Writes dotted config field → value, with tuples as text; called at each start of a run, after `open`."""

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes name → value, which may be NaN, of a step; several calls may have the same step."""

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a figure, uint8 [height, width, 3]."""

    def flush(self) -> None:
        """Makes everything written so far durable; called at every checkpoint."""

    def close(self) -> None:
        """Closes the output; called once, after all other methods."""


def find(name: str) -> type[Sink]:
    """Returns the class of a sink; raises UserError, with the nearest name, if there is none."""
    found: type[Sink] = plugins.find("metric_sinks", name, SINKS, "log.sinks")
    return found


def names(log: ConfigDict) -> tuple[str, ...]:
    """Returns the names of the sinks of `config.log`; 'pictures', the figures in the workdir, is always among them."""
    return tuple(dict.fromkeys(("pictures", *("tensorboard",) * log.tensorboard, *log.sinks)))
