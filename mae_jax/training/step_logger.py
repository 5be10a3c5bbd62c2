"""Logs train metrics, throughput and unreadable images, one step late."""

import collections
import logging
import math

import jax

from mae_jax.evals.accumulators import Means
from mae_jax.methods.base import Metrics
from mae_jax.runtime.console import print_once
from mae_jax.runtime.progress import Line
from mae_jax.storage.metric_writer import MetricWriter
from mae_jax.training.guards import Guards
from mae_jax.training.run import Run
from mae_jax.training.throughput import Speed, peak_flops, progress_line, progress_note, train_flops

logger = logging.getLogger(__name__)


class StepLogger:
    """Reads the metrics of each step one step late, so that the device does not wait for the host, and checks guards.

    If one more non-finite step would stop the run, it reads them without delay: with guard.max_nonfinite=1 always.
    """

    def __init__(self, run: Run, recorder: MetricWriter, line: Line | None = None):
        """Args: run: the run; recorder: writes the metrics; line: the progress line on a terminal."""
        self.run, self.recorder, self.line = run, recorder, line or Line()
        self.every = run.timeline.log_every
        self.waiting: collections.deque[tuple[int, Metrics, jax.Array]] = collections.deque()
        self.means, self.guards = Means(), Guards(run)
        self.named: set[str] = set()
        self.speed = Speed(run.config.batch_size, train_flops(run.program.method), peak_flops(jax.devices()[0]))

    def record(self, done: int, metrics: Metrics, ids: jax.Array) -> None:
        """Queues the metrics of the step that has just been dispatched, and logs those of the previous step.

        Args:
          done: number of steps so far, including this one.
          metrics: name → (sum, weight), on the devices.
          ids: ids of the examples, int32 [B], or [B, 2] for large data sets.

        Raises:
          GuardError: a guard stops the run, see `Guards.check`.
        """
        self.waiting.append((done, metrics, ids))
        # No step may follow the one that stops a run, since the state after it is saved for replay.
        while len(self.waiting) > 1 or (self.waiting and self.guards.one_more_stops()):
            self._handle(*self.waiting.popleft())

    def flush(self) -> None:
        """Logs all queued steps and writes them to disk; raises GuardError as `record`."""
        while self.waiting:
            self._handle(*self.waiting.popleft())
        self.recorder.flush()

    def _handle(self, done: int, metrics: Metrics, ids: jax.Array) -> None:
        values = jax.device_get(metrics)
        self.means.add(values)
        total, weight = map(float, values["loss"])
        self.line.done = done
        self.line.note = progress_note(total / weight if weight else math.nan, self.speed.now(),
                                       (self.run.timeline.total - done) * self.run.config.batch_size)
        self.guards.check(done, {name: float(total) for name, (total, _) in values.items()}, ids)
        if done % self.every == 0 or done == self.run.timeline.total:
            line = self.means.pop("train/") | self.speed.take()
            self.recorder.write_scalars(done, line)
            self._name_bad_images()
            print_once(progress_line(done, self.run.timeline.total, line, self.run.config.batch_size))

    def _name_bad_images(self) -> None:
        """Logs the name of each unreadable image of this process once."""
        for name in dict.fromkeys(self.run.inputs.bad):
            if name not in self.named:
                logger.warning("replaced an unreadable image: %s", name)
                self.named.add(name)
