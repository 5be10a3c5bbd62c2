"""Metric sink for TensorBoard: by clu if TensorFlow is imported already or the workdir is in a bucket, else without it.
"""

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
    """Writes events to <workdir>/tensorboard."""

    what = "TensorBoard events"
    writer: Any

    def open(self, workdir: epath.Path, restored_step: float) -> None:
        folder = workdir / "tensorboard"
        # TensorFlow may be missing, and its import takes seconds.
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
    """Writes a local file of events by the package tensorboard, with the methods of clu's writer."""

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

        It writes no Experiment, which lists fields and metrics: TensorBoard would use the first Experiment it finds for
        all runs, and hide fields that only other runs have. Without any, it shows the fields of all runs.
        """
        from tensorboard.plugins.hparams import summary_v2

        self._write(summary=summary_v2.hparams_pb(fields))

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes name → value."""
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
        """Writes buffered events to the file."""
        self._records.flush()

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
