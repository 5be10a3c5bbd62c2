"""Guards that stop a run: repeated non-finite steps, and too many unreadable images."""

import json
import logging

import jax

from mae_jax.errors import GuardError, root_cause
from mae_jax.ops.example_ids import whole
from mae_jax.rng import stream_key
from mae_jax.runtime import sharding
from mae_jax.storage import paths, workdir_lock
from mae_jax.training.run import Run

logger = logging.getLogger(__name__)

MAX_LISTED_IMAGES = 20  # unreadable images that the error names
BAD_IMAGES_AFTER = 100  # images before the fraction of unreadable ones is checked


class Guards:
    """Checks the global metrics of every step and raises GuardError; identical on every process."""

    def __init__(self, run: Run):
        self.run = run
        self.seen = self.replaced = 0
        self.in_a_row = run.config.guard.max_nonfinite  # successive non-finite steps; the worst case first
        self.bad: list[tuple[int, jax.Array]] = []  # successive non-finite steps, and the ids of their examples

    def check(self, done: int, sums: dict[str, float], ids: jax.Array) -> None:
        """Checks one step.

        Args:
          done: number of steps so far, including this one.
          sums: metric → sum over the batch.
          ids: ids of the examples, int32 [B], or [B, 2] for large data sets.

        Raises:
          GuardError: there were guard.max_nonfinite successive non-finite steps, or more than guard.max_bad_fraction of
            the images are unreadable.
        """
        guard = self.run.config.guard
        self.in_a_row = int(sums["bad_steps"])
        self.bad = [*self.bad, (done - 1, ids)] if self.in_a_row else []
        if self.in_a_row >= guard.max_nonfinite:
            where = self._record(done - 1, sums)
            raise GuardError(
                f"{self.in_a_row} steps in a row had a loss or gradients that are not finite, the last one "
                f"step {done - 1}; their examples are {where}; inspect it with: mae_jax replay "
                f"--workdir={self.run.workdir} --step={done - 1}")
        self.seen += self.run.config.batch_size
        self.replaced += int(sums["replaced"])
        if self.seen >= BAD_IMAGES_AFTER and self.replaced > guard.max_bad_fraction * self.seen:
            raise GuardError(f"{self.replaced} of {self.seen} images could not be read, more than "
                             f"guard.max_bad_fraction={guard.max_bad_fraction}: "
                             f"{'; '.join(list(dict.fromkeys(self.run.inputs.bad))[:MAX_LISTED_IMAGES])}")

    def one_more_stops(self) -> bool:
        """Returns whether another non-finite step would stop the run."""
        return self.in_a_row >= self.run.config.guard.max_nonfinite - 1

    def _record(self, step: int, sums: dict[str, float]) -> str:
        """Writes the examples and keys of the non-finite steps to the workdir; returns the file for the message."""
        everywhere = sharding.replicated(self.run.program.mesh)
        seed = self.run.config.seed
        steps = [{"step": number, "ids": whole(jax.device_put(ids, everywhere)).tolist(),
                  "key": jax.random.key_data(stream_key(seed, number, "loss")).tolist()} for number, ids in self.bad]
        file = self.run.workdir / f"guard_{step}.json"
        if jax.process_index() == 0:
            told = {name: str(sums[name]) for name in ("loss", "grad_norm")}  # JSON has no NaN
            try:
                if why := workdir_lock.why_unwritable():
                    raise OSError(why)
                paths.replace_text(file, json.dumps({"seed": seed, **told, "steps": steps}) + "\n")
            except OSError as error:  # the run stops in any case
                logger.warning("cannot write %s: %s", file, root_cause(error))
                return "not on record"
        return f"in {file}"
