"""A run that hangs on purpose: `python -m tests.faults.hang PLACE WORKDIR [guard.stall_seconds]`."""

import sys
import time
from pathlib import Path

from mae_jax import data
from mae_jax.commands import cli
from mae_jax.storage.checkpoint import Checkpoints
from mae_jax.training import loop
from mae_jax.training.evaluation import PeriodicEvaluation
from mae_jax.training.step_logger import StepLogger
from tests.faults import peer

SECONDS = 5.0  # guard.stall_seconds; the tiny run's steps take milliseconds
AT = 3  # the step at which it hangs
PLACES = {"input": f"the input of step {AT}", "step": f"step {AT}", "save": "the save of step 4",
          "evaluation": "the evaluation at step 4"}


def sleeps(*_) -> None:
    print("hangs", flush=True)
    time.sleep(600)


def hang(place: str) -> None:
    """Makes the named part of a run never come back."""
    if place == "save":
        Checkpoints.save = sleeps
    elif place == "evaluation":
        PeriodicEvaluation.evaluate = lambda self, state, done: sleeps() if done == 4 else None
    elif place == "step":
        push = StepLogger.record
        StepLogger.record = lambda self, done, *args: (sleeps if done == AT else push)(self, done, *args)
    else:
        make = data.OpenedData.batches

        def made(*args):
            inputs = make(*args)

            def batches(start: int):
                for step, batch in enumerate(inputs.train(start), start + 1):
                    # `data.prefetch` batches are fetched ahead.
                    if step == AT + config.data.prefetch:
                        sleeps()
                    yield batch

            return inputs._replace(train=batches)

        data.OpenedData.batches = made


if __name__ == "__main__":
    chosen, folder, *seconds = sys.argv[1:]
    fields = {"data.eval_split": "test", "eval.every": "4 steps"} if chosen == "evaluation" else {"eval.every": ""}
    config = peer.small_config(Path(folder).parent, {"guard.stall_seconds": float(*seconds or [SECONDS]), **fields})
    hang(chosen)
    sys.exit(cli.guarded(lambda: loop.train(config, folder)))
