"""Free space on a run's disk, for the checkpoints that the run will keep."""

import logging
import math
import os
import shutil
from typing import Any

import jax
from etils import epath

from mae_jax.errors import UserError

logger = logging.getLogger(__name__)


def check_room(workdir: epath.Path, state: Any, more: int) -> None:
    """Checks that the disk of a workdir has space for checkpoints; logs a warning if not for all of them.

    Buckets are not checked.

    Args:
      workdir: of the run; it may not exist yet.
      state: tree of arrays or shapes in a checkpoint. Compression, which saves a few percent, is not counted.
      more: largest number of additional checkpoints at any time, including one that is being written before an old one
        is deleted.

    Raises:
      UserError: there is not enough space for one checkpoint.
    """
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    free = free_bytes(workdir / "checkpoints")  # may be a link to another disk
    if free is None or size * more <= free:
        return
    said = f"{workdir}: its disk has {_text(free)} left, a checkpoint of this run needs {_text(size)}"
    if free < size:
        raise UserError(f"{said}; make room, or use another --workdir")
    logger.warning("%s, and up to %d more will be kept (checkpoint.keep_last, checkpoint.keep_every)", said, more)


def free_bytes(path: epath.PathLike) -> int | None:
    """Returns the free bytes on the disk of a path, which may not exist yet; None for a bucket, or if unknown."""
    if str(path).startswith("gs://"):
        return None
    folder = os.path.abspath(path)
    while not os.path.exists(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None  # some network file systems report 0 for everything


def _text(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
