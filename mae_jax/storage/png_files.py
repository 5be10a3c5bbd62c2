"""Metric sink that writes figures as PNG files."""

import io
import logging

import numpy as np
from etils import epath

from mae_jax.storage import workdir_lock
from mae_jax.storage.metric_sinks import LOOP_RETRY_SECONDS, Sink
from mae_jax.storage.paths import make_folder, replace_bytes

logger = logging.getLogger(__name__)


class PngFiles(Sink):
    """Writes figures to <workdir>/pictures/<name>_<step>.png; a failed write is a warning, and the sink stays."""

    what = "pictures"
    folder: epath.Path

    def open(self, workdir: epath.Path, restored_step: float) -> None:
        self.folder = workdir / "pictures"

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        from PIL import Image

        path = self.folder / f"{name}_{step:07d}.png"
        content = io.BytesIO()
        Image.fromarray(image).save(content, format="PNG")
        try:
            if why := workdir_lock.why_unwritable():
                raise OSError(why)
            make_folder(path.parent)
            replace_bytes(path, content.getvalue(), LOOP_RETRY_SECONDS)
        except OSError as error:  # a full disk, an unreachable bucket, or another run that may have the workdir
            logger.warning("cannot write %s (%s)", path, error)
