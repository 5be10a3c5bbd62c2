"""What a run says of its steps: figures, speed, the names of bad images."""

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
    """Reads metrics one step late, so that the device need not wait for the host; the guards look at them too.

    It waits where one more step that is not finite stops the run: with guard.max_nonfinite=1, after each step.
    """

    def __init__(self, run: Run, recorder: MetricWriter, line: Line | None = None):
        """Args: run; recorder: to which metrics go; line: which shows on a terminal how far the run is."""
        self.run, self.recorder, self.line = run, recorder, line or Line()
        self.every = run.timeline.log_every
        self.waiting: collections.deque[tuple[int, Metrics, jax.Array]] = collections.deque()
        self.means, self.guards = Means(), Guards(run)
        self.named: set[str] = set()
        self.speed = Speed(run.config.batch_size, train_flops(run.program.method), peak_flops(jax.devices()[0]))

    def record(self, done: int, metrics: Metrics, ids: jax.Array) -> None:
        """Takes what the step that has just been dispatched gives, and handles the step before.

        Args:
          done: steps taken, this one included.
          metrics: name → (sum, weight), on the devices.
          ids: of the examples, int32 [B].

        Raises:
          GuardError: the step before was one too many.
        """
        self.waiting.append((done, metrics, ids))
        # The step after the one that stops a run must not begin: the state to save is the one that it began with.
        while len(self.waiting) > 1 or (self.waiting and self.guards.one_more_stops()):
            self._handle(*self.waiting.popleft())

    def flush(self) -> None:
        """Handles all that waits and makes sure that it is on disk."""
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
        """Logs the images that this process could not read, each once."""
        for name in dict.fromkeys(self.run.inputs.bad):
            if name not in self.named:
                logger.warning("replaced a bad picture: %s", name)
                self.named.add(name)
