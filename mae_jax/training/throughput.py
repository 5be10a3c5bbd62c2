"""Throughput: images per second, share of time spent waiting for data, and model FLOPs utilization (MFU)."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax

from mae_jax.methods.base import Method
from mae_jax.runtime.console import clock

# Dense bfloat16 FLOP/s per JAX device, from the vendors' product pages; a TPU v2 or v3 device is one of a chip's two
# cores. The first entry whose name is part of the device kind applies.
PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1153e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "V100": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Returns the device's peak in bfloat16 FLOP/s; None for a device that is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device.device_kind), None)


def train_flops(method: Method) -> int:
    """Returns the FLOPs per image of a train step; the backward pass costs twice its forward pass."""
    return 3 * method.forward_flops() + method.frozen_flops()


class Speed:
    """Measures images per second, the share of time spent waiting for data and MFU over an interval of steps."""

    def __init__(self, batch_size: int, flops_per_image: int, peak: float | None):
        self.batch_size, self.flops, self.peak = batch_size, flops_per_image, peak
        self.last = {"train/images_per_sec": math.nan, "train/data_wait": math.nan}
        self.start()

    def start(self) -> None:
        """Begins an interval; call it after anything that is not training."""
        self.began, self.steps, self.waited = time.monotonic(), 0, 0.0

    def waiting(self, produce: Callable[[], Any]) -> Any:
        """Returns produce(), and counts its time as waiting for data."""
        before = time.monotonic()
        item = produce()
        self.waited += time.monotonic() - before
        self.steps += 1
        return item

    def now(self) -> float:
        """Returns images per second of the last complete interval, or of the current one before that; NaN at first."""
        if not math.isnan(self.last["train/images_per_sec"]) or not self.steps:
            return self.last["train/images_per_sec"]
        return self.steps * self.batch_size / max(time.monotonic() - self.began, 1e-9)

    def take(self) -> dict[str, float]:
        """Returns the metrics of the interval and begins another one.

        Without a step in the interval, returns those of the previous one. They are NaN at first: the first step, which
        loads compiled programs, is not timed.
        """
        if not self.steps:
            return self.last
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = self.steps * self.batch_size / seconds
        out = {"train/images_per_sec": rate, "train/data_wait": self.waited / seconds}
        if self.peak:
            out["train/mfu"] = rate * self.flops / (self.peak * jax.device_count())
        self.start()
        self.last = out
        return out


def progress_note(loss: float, rate: float, images_left: int) -> str:
    """Returns the text of the progress line on a terminal: loss, images per second and time left."""
    speed = "" if math.isnan(rate) or not rate else f"  {rate:.0f} images/s  {clock(images_left / rate)} left"
    return f"loss {loss:.4f}{speed}"


def progress_line(step: int, total: int, values: dict[str, float], batch_size: int) -> str:
    """Returns the line that is printed every log.every steps; `values` are the metrics of the interval."""
    line = f"step {step}/{total} ({step / total:.0%})  loss {values['train/loss']:.4f}  lr {values['train/lr']:.2e}"
    rate = values["train/images_per_sec"]
    if math.isnan(rate):  # not timed yet
        return line
    mfu = f"  mfu {values['train/mfu']:.1%}" if "train/mfu" in values else ""
    left = clock((total - step) * batch_size / rate) if rate > 0 else "?"
    return f"{line}  {rate:.0f} images/s  data wait {values['train/data_wait']:.0%}{mfu}  {left} left"
