"""Durations as a config writes them: '800 epochs', '100 steps', '5e6 examples', and the lesser of two of these."""

import math
import re
from typing import Any, NamedTuple

from mae_jax.errors import UserError

_LIMIT = ", at most "
MAX_STEPS = 2**31 - 1  # of a run: TrainState counts them in 32 bits


class Timeline(NamedTuple):
    """When what happens in a run, in steps."""

    batch_size: int
    examples: int  # of an epoch
    total: int
    warmup: int  # of the learning rate, at most `total`
    save_every: int  # the periods are at least 1, or 0 where they are off
    keep_every: int
    eval_every: int
    log_every: int
    patience: int  # since the best evaluation, before a run ends early; 0: off

    @classmethod
    def of(cls, config: Any, examples: int) -> "Timeline":
        """Returns the timeline of a config, whose training split has so many examples; raises UserError."""
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
        """Returns a duration of this run in steps; raises UserError."""
        return steps(duration, self.batch_size, self.examples)


def steps(duration: str, batch_size: int, examples: int) -> int:
    """Converts a duration to steps: '800 epochs', '100 steps' or '5e6 examples'; '' gives 0.

    Epochs are floor(examples · epochs / batch_size) steps. '4e8 examples, at most 5000 epochs' is the shorter of two.

    Args:
      duration: the text.
      batch_size: examples per step.
      examples: of an epoch.

    Raises:
      UserError: the text is no duration.
    """
    if not duration:
        return 0
    return min(_steps(part, batch_size, examples) for part in duration.split(_LIMIT, 1))


def _steps(duration: str, batch_size: int, examples: int) -> int:
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{0,18})?(?:e\d{1,2})?)\s*(epochs?|steps?|examples?)\s*", duration)
    if not match:
        raise UserError(f"cannot read the duration {duration!r}; write '800 epochs', '100 steps' or '5e6 examples', or "
                        "two of these as '5e6 examples, at most 800 epochs'")
    amount, unit = float(match[1]), match[2].rstrip("s")
    per_step = {"epoch": batch_size / max(examples, 1), "step": 1, "example": batch_size}[unit]
    # The nudge keeps 3 · (1/3) from flooring to 0: a millionth of a step is no step.
    return math.floor(amount / per_step + 1e-6)
