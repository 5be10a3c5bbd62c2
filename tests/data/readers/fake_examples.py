"""Examples for worker processes, which import nothing else of the tests."""

import os
from collections import deque
from pathlib import Path

import numpy as np

from mae_jax.errors import UserError

FATAL = 21  # the position at which something happens


def example(bad: deque[str], position: int) -> dict:
    return {"id": position, "row": np.full(3, position % 256, np.uint8)}


def fails(bad: deque[str], position: int) -> dict:
    if position == FATAL:
        raise UserError("the disk is gone")
    return example(bad, position)


def odd(bad: deque[str], position: int) -> dict:
    return {"id": position, "row": np.zeros(2, np.uint8)}


def dies(file: Path, bad: deque[str], position: int) -> dict:
    """Kills its process as often as the file has letters."""
    if position == FATAL and (letters := file.read_text()):
        file.write_text(letters[1:])
        os.kill(os.getpid(), 9)
    return example(bad, position)
