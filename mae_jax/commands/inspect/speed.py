"""Throughput of the input pipeline, of one worker process, and the number of cores that the devices need."""

import math
import time
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from mae_jax.errors import pluralize

if TYPE_CHECKING:
    from mae_jax.data import Inputs, OpenedData
    from mae_jax.methods.base import Method

SECONDS = 3.0  # duration of each measurement


def speed_lines(config: ConfigDict, opened: "OpenedData", method: "Method", inputs: "Inputs", wanted: float
                ) -> list[str]:
    """Measures the input alone, after its first batch; returns lines about its throughput and the needed cores.

    Args:
      config: a config without 'auto'.
      opened: the data of the config.
      method: the method of the config.
      inputs: the input pipeline of the config.
      wanted: images per second that the devices consume; 0: not known.
    """
    from mae_jax.data.readers import random_access

    cores = random_access.cores()
    workers = 0 if config.data.source == "batches" else random_access.workers(config.data, opened.info.num_train)
    if not workers:
        rate, busy = _rate(inputs)
        each = f"{1 / busy:.0f} images/s per core ({busy * 1e3:.2f} ms of one core each)"
        return [f"{rate:.0f} images/s of threads on {cores} cores; {each}", *_need(wanted, 1 / busy, cores, "")]
    rate, _ = _rate(inputs)
    lines = [f"{rate:.0f} images/s of {workers} worker processes on {cores} cores, {rate / workers:.0f} each"]
    if workers > 1:
        alone = config.copy_and_resolve_references()
        alone.data.workers = "1"
        opened.config = alone
        one, _ = _rate(opened.batches(method.eval_spec(), method.patch_order(), method.views()))
        opened.config = config
        lines[0] += f"; one alone makes {one:.0f}, so that all make {rate / one:.1f} times as many"
    return lines + _need(wanted, rate / workers, cores, f", as {workers} made them here together")


def _rate(inputs: "Inputs") -> tuple[float, float]:
    """Returns images per second of wall-clock time, and this process's CPU seconds per image."""
    batches = inputs.train(0)
    next(batches)
    begin, busy, images = time.monotonic(), time.process_time(), 0
    while (wall := time.monotonic() - begin) < SECONDS:
        images += len(next(batches)["id"])
    return images / wall, (time.process_time() - busy) / images


def _need(wanted: float, each: float, cores: int, how: str) -> list[str]:
    """Returns the line about the cores that the devices need; [] if their consumption is not known."""
    if not wanted:
        return []
    count = math.ceil(wanted / each)
    lacks = f"; this machine has {cores}" if count > cores else ""
    return [f"devices that take {wanted:.0f} images/s need {pluralize(count, 'core')} with a worker process each "
            f"(data.workers={count}), of {each:.0f} images/s{how}{lacks}"]
