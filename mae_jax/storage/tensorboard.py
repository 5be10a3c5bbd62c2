"""TensorBoard events, through clu."""

from typing import Any

import numpy as np
from etils import epath

from mae_jax.storage.metric_sinks import Sink


class TensorBoard(Sink):
    """<workdir>/tensorboard."""

    what = "TensorBoard events"
    writer: Any

    def open(self, workdir: epath.Path, restored_step: float) -> None:
        from clu import metric_writers  # imports TensorFlow, which may be missing

        self.writer = metric_writers.SummaryWriter(str(workdir / "tensorboard"))

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        self.writer.write_scalars(step, values)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        self.writer.write_images(step, {name: image[None]})

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
