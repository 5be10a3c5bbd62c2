"""What stops a run that goes wrong: gradients that stay not finite, too many bad images."""

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

MAX_LISTED_IMAGES = 20  # bad images named in the line that stops a run
BAD_IMAGES_AFTER = 100  # images seen before their bad fraction can stop a run


class Guards:
    """Looks at the sums of every step's metrics; on all processes alike, since the sums are global."""

    def __init__(self, run: Run):
        self.run = run
        self.seen = self.replaced = 0
        self.in_a_row = run.config.guard.max_nonfinite  # steps that were not finite; before the first look, at worst
        self.bad: list[tuple[int, jax.Array]] = []  # steps in a row that were not finite, and their examples

    def check(self, done: int, sums: dict[str, float], ids: jax.Array) -> None:
        """Raises GuardError when the step that made the run's steps `done` was one too many.

        Args:
          done: steps taken, this one included.
          sums: metric → its sum over the batch.
          ids: of the examples, int32 [B].
        """
        guard = self.run.config.guard
        self.in_a_row = int(sums["bad_steps"])
        self.bad = [*self.bad, (done - 1, ids)] if self.in_a_row else []
        if self.in_a_row >= guard.max_nonfinite:
            where = self._record(done - 1, sums)
            raise GuardError(
                f"{self.in_a_row} steps in a row had a loss or gradients that are not finite, the last one "
                f"step {done - 1}; their examples are {where}; look into it with: python -m mae_jax.main "
                f"--mode=replay --workdir={self.run.workdir} --step={done - 1}")
        self.seen += self.run.config.batch_size
        self.replaced += int(sums["replaced"])
        if self.seen >= BAD_IMAGES_AFTER and self.replaced > guard.max_bad_fraction * self.seen:
            raise GuardError(f"{self.replaced} of {self.seen} pictures could not be read, more than "
                             f"guard.max_bad_fraction={guard.max_bad_fraction}: "
                             f"{'; '.join(list(dict.fromkeys(self.run.inputs.bad))[:MAX_LISTED_IMAGES])}")

    def one_more_stops(self) -> bool:
        """Says whether the run must stop if the next step is not finite either."""
        return self.in_a_row >= self.run.config.guard.max_nonfinite - 1

    def _record(self, step: int, sums: dict[str, float]) -> str:
        """Writes what the bad steps were made of; returns where."""
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
            except OSError as error:  # the verdict stands all the same
                logger.warning("cannot write %s: %s", file, root_cause(error))
                return "not on record"
        return f"in {file}"
