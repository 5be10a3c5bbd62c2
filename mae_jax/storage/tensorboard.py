"""TensorBoard events: through clu where TensorFlow is there already, or the workdir is in a bucket; else without it."""

import io
import os
import socket
import sys
import time
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from mae_jax.storage.metric_sinks import Sink


class TensorBoard(Sink):
    """<workdir>/tensorboard."""

    what = "TensorBoard events"
    writer: Any

    def open(self, workdir: epath.Path, restored_step: float) -> None:
        folder = workdir / "tensorboard"
        # To import TensorFlow takes seconds, or it may be missing.
        if sys.modules.get("tensorflow") is None and not str(folder).startswith("gs://"):
            self.writer = Events(folder)
            return
        from clu import metric_writers

        self.writer = metric_writers.SummaryWriter(str(folder))

    def write_config(self, fields: dict[str, bool | int | float | str]) -> None:
        self.writer.write_hparams(fields)

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        self.writer.write_scalars(step, values)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        self.writer.write_images(step, {name: image[None]})

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Events:
    """A file of events on a disk, written by the package tensorboard alone; the methods are those of clu's writer."""

    def __init__(self, folder: epath.Path):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._records = RecordWriter((folder / name).open("wb"))
        self._write(file_version="brain.Event:2")

    def write_hparams(self, fields: dict[str, Any]) -> None:
        """Writes name → value for the tab HPARAMS.

        No Experiment, which would list fields and metrics: TensorBoard takes the first that it finds for all runs it
        shows, and those of others would be missing. Without one it lists what any of them has.
        """
        from tensorboard.plugins.hparams import summary_v2

        self._write(summary=summary_v2.hparams_pb(fields))

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes name → number."""
        self._write(step=step, summary=self._summary(value=[
            self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]))

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Writes name → uint8 [n, height, width, 3]."""
        found = []
        for name, several in images.items():
            for number, pixels in enumerate(several):
                file, (height, width, _) = io.BytesIO(), pixels.shape
                Image.fromarray(pixels).save(file, "PNG")
                image = self._summary.Image(height=height, width=width, colorspace=3,
                                            encoded_image_string=file.getvalue())
                found.append(self._summary.Value(tag=f"{name}/{number}" if number else name, image=image))
        self._write(step=step, summary=self._summary(value=found))

    def flush(self) -> None:
        """Writes what is still in memory."""
        self._records.flush()

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
