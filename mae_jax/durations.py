"""Durations in configs: '800 epochs', '100 steps', '5e6 examples', or the shorter of two of these."""

import math
import re
from typing import Any, NamedTuple

from mae_jax.errors import UserError

_LIMITS = {", at most ": min, ", at least ": max}
MAX_STEPS = 2**31 - 1  # most steps of a run: TrainState counts them in 32 bits


class Timeline(NamedTuple):
    """The durations of a run, in steps. Periods are at least 1, or 0 if off.

    Attributes:
      batch_size: examples per step.
      examples: examples per epoch.
      total: length of the run.
      warmup: of the learning rate, at most `total`.
      save_every: period of checkpoints.
      keep_every: period of the checkpoints that are never deleted.
      eval_every: period of evaluations.
      log_every: period of logged metrics.
      patience: time since the best evaluation after which the run ends early; 0: off.
    """

    batch_size: int
    examples: int
    total: int
    warmup: int
    save_every: int
    keep_every: int
    eval_every: int
    log_every: int
    patience: int

    @classmethod
    def of(cls, config: Any, examples: int) -> "Timeline":
        """Returns the timeline of a config whose training split has `examples` examples.

        Raises:
          UserError: a duration cannot be parsed, or the run is longer than MAX_STEPS.
        """
        def count(duration: str) -> int:
            return steps(duration, config.batch_size, examples)

        def period(duration: str) -> int:
            return max(1, count(duration)) if duration else 0

        total = count(config.train.duration)
        if total > MAX_STEPS:
            raise UserError(f"train.duration={config.train.duration!r} is {total:.3g} steps; at most {MAX_STEPS}")
        return cls(config.batch_size, examples, total, min(count(config.optim.warmup), total),
                   period(config.checkpoint.every), period(config.checkpoint.keep_every), period(config.eval.every),
                   period(config.log.every), period(config.train.patience))

    def steps(self, duration: str) -> int:
        """Converts a duration to steps of this run; raises UserError if it cannot be parsed."""
        return steps(duration, self.batch_size, self.examples)


def steps(duration: str, batch_size: int, examples: int) -> int:
    """Converts a duration to steps, rounded down.

    Args:
      duration: '800 epochs', '100 steps' or '5e6 examples'; '4e8 examples, at most 5000 epochs' is the shorter of two,
        '100 epochs, at least 400 steps' the longer; '' gives 0.
      batch_size: examples per step.
      examples: examples per epoch.

    Raises:
      UserError: the text is not a duration.
    """
    if not duration:
        return 0
    for limit, choose in _LIMITS.items():
        if limit in duration:
            return choose(_steps(part, batch_size, examples) for part in duration.split(limit, 1))
    return _steps(duration, batch_size, examples)


def _steps(duration: str, batch_size: int, examples: int) -> int:
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{0,18})?(?:e\d{1,2})?)\s*(epochs?|steps?|examples?)\s*", duration)
    if not match:
        raise UserError(f"cannot read the duration {duration!r}; write '800 epochs', '100 steps' or '5e6 examples', or "
                        "two of these as '5e6 examples, at most 800 epochs' or '100 epochs, at least 400 steps'")
    amount, unit = float(match[1]), match[2].rstrip("s")
    per_step = {"epoch": batch_size / max(examples, 1), "step": 1, "example": batch_size}[unit]
    # The tolerance compensates for rounding: 3 · (1/3) must not become 0.
    return math.floor(amount / per_step + 1e-6)
