"""Metrics on their way out: means of (sum, weight), metrics.jsonl, TensorBoard and the progress line."""

import json
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

logger = logging.getLogger(__name__)
REMOTE_PERIOD = 30.0  # seconds between rewrites of metrics.jsonl in a bucket, which cannot append


class Means:
    """Accumulates metrics name → (sum, weight) and returns their means."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, metrics: dict[str, tuple[Any, Any]]) -> None:
        for name, (total, weight) in metrics.items():
            old_total, old_weight = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (old_total + float(total), old_weight + float(weight))

    def take(self, prefix: str = "") -> dict[str, float]:
        """Returns prefix + name → mean and starts anew; a metric without weight is NaN."""
        out = {prefix + name: total / weight if weight else float("nan") for name, (total, weight) in self.sums.items()}
        self.sums = {}
        return out


class JsonLines:
    """metrics.jsonl: one JSON object per line, each step of a kind once.

    A line that cannot be written (a full disk) is kept and written with the next one.
    """

    def __init__(self, path: epath.Path, restored_step: int):
        self.path = path
        self.local = "://" not in str(path)
        self.pending: list[str] = []
        self.written = time.monotonic()
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= restored_step]
        self.lines = [] if self.local else kept
        self.seen = {(json.loads(line)["step"], name) for line in kept for name in json.loads(line)}
        if len(kept) < len(lines):
            path.write_text("".join(line + "\n" for line in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values})
        self.pending.append(line)
        if self.local or time.monotonic() - self.written > REMOTE_PERIOD:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending; a failure is a warning and is tried again at the next call."""
        if not self.pending:
            return
        try:
            if self.local:
                with open(self.path, "a") as file:
                    file.write("".join(line + "\n" for line in self.pending))
            else:
                self.lines += self.pending
                self.path.write_text("".join(line + "\n" for line in self.lines))
            self.pending = []
        except OSError as error:
            logger.warning("cannot write %s (%s); kept, and tried again", self.path, error)
        self.written = time.monotonic()


def _step_of(line: str) -> float:
    """Returns the step of a line; a line cut by a crash counts as past everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def open_tensorboard(workdir: epath.Path) -> Any:
    """Returns clu's metric writer, or None with one warning where TensorFlow or TensorBoard is missing."""
    try:
        from clu import metric_writers
    except ImportError as error:
        logger.warning("no TensorBoard events: %s", error)
        return None
    return metric_writers.SummaryWriter(str(workdir / "tensorboard"))


class Recorder:
    """Writes scalars and pictures of process 0 to every sink; other processes write nothing."""

    def __init__(self, workdir: epath.Path, restored_step: int, tensorboard: bool, active: bool = True):
        self.workdir, self.active = workdir, active
        self.jsonl = JsonLines(workdir / "metrics.jsonl", restored_step) if active else None
        self.board = open_tensorboard(workdir) if active and tensorboard else None

    def has(self, step: int, name: str) -> bool:
        """Says whether metrics.jsonl held the metric at the step when the run began."""
        return self.jsonl is not None and (step, name) in self.jsonl.seen

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes name → number; JSON has no NaN, so a number that is not finite is written as null."""
        if self.jsonl is None:
            return
        self.jsonl.write(step, {k: v if np.isfinite(v) else None for k, v in values.items()})
        if self.board:
            self.board.write_scalars(step, values)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes uint8 [height, width, 3] as pictures/<name>_<step>.png."""
        from PIL import Image

        if not self.active:
            return
        folder = self.workdir / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}_{step:07d}.png").open("wb") as file:
            Image.fromarray(image).save(file, format="PNG")
        if self.board:
            self.board.write_images(step, {name: image[None]})

    def flush(self) -> None:
        if self.jsonl:
            self.jsonl.flush()
        if self.board:
            self.board.flush()

    def close(self) -> None:
        self.flush()
        if self.board:
            self.board.close()


class Speed:
    """Measures a stretch of steps: images per second, the share of time spent waiting for data, MFU, time left."""

    def __init__(self, batch_size: int, flops_per_image: int, peak: float | None):
        self.batch_size, self.flops, self.peak = batch_size, flops_per_image, peak
        self.last = {"train/images_per_sec": float("nan"), "train/data_wait": float("nan")}
        self.start()

    def start(self) -> None:
        """Begins a stretch; call it after anything that is not training."""
        self.began, self.steps, self.waited = time.monotonic(), 0, 0.0

    def waiting(self, produce: Callable[[], Any]) -> Any:
        """Returns produce(), counted as waiting for data."""
        before = time.monotonic()
        item = produce()
        self.waited += time.monotonic() - before
        self.steps += 1
        return item

    def take(self) -> dict[str, float]:
        """Returns the figures of the stretch and begins another; those of the one before where no step was taken."""
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


def progress_line(step: int, total: int, values: dict[str, float], batch_size: int) -> str:
    """Returns the line that is printed every log.every steps."""
    rate = values["train/images_per_sec"]
    mfu = f"  mfu {values['train/mfu']:.1%}" if "train/mfu" in values else ""
    left = clock((total - step) * batch_size / rate) if rate > 0 else "?"
    return (f"step {step}/{total} ({step / total:.0%})  loss {values['train/loss']:.4f}  lr {values['train/lr']:.2e}  "
            f"{rate:.0f} images/s  data wait {values['train/data_wait']:.0%}{mfu}  {left} left")


def clock(seconds: float) -> str:
    """Returns '1h02m', '3m10s' or '12s'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
