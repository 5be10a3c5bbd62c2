"""Room on a run's disk: whether it can hold a checkpoint, and all that the run keeps."""

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
    """Looks whether checkpoints fit on the disk of a workdir; a bucket has room.

    Args:
      workdir: of the run, which need not be there yet.
      state: tree of arrays or their shapes: what a checkpoint holds, before it is compressed by a few percent.
      more: how many checkpoints there will be at most that are not there now, the one that is being written before an
        old one is deleted included.

    Raises:
      UserError: there is less room than for one.
    """
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    free = free_bytes(workdir / "checkpoints")  # which may be a link to another disk
    if free is None or size * more <= free:
        return
    said = f"{workdir}: its disk has {_text(free)} left, a checkpoint of this run needs {_text(size)}"
    if free < size:
        raise UserError(f"{said}; make room, or use another --workdir")
    logger.warning("%s, and up to %d more will be kept (checkpoint.keep_last, checkpoint.keep_every)", said, more)


def free_bytes(path: epath.PathLike) -> int | None:
    """Returns how much may be written where a path is or is to be; None of a bucket, or where nothing tells it."""
    if str(path).startswith("gs://"):
        return None
    folder = os.path.abspath(path)
    while not os.path.exists(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None  # some network file systems say 0 of all


def _text(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
