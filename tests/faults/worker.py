"""A training process that writes down which examples each step was given: `python worker.py IDS_FILE WORKDIR`."""

import sys
from collections.abc import Iterator

from mae_jax import data
from mae_jax.commands import cli
from mae_jax.config import default, runlocal
from mae_jax.training import loop

STEPS = 40


def small_config():
    config = default("mae")
    runlocal(config)
    config.data.eval_split = ""
    config.train.duration = f"{STEPS} steps"
    config.optim.ema = 0.9
    config.checkpoint.update(every="4 steps", keep_last=2)
    config.log.update(every="4 steps", tensorboard=False)
    return config.lock()


def recording(make, file):
    """Wraps `OpenedData.batches` so that every batch that is drawn leaves a line 'step id id ...'."""
    def wrapped(*args):
        inputs = make(*args)

        def batches(start: int) -> Iterator:
            for step, batch in enumerate(inputs.train(start), start):
                with open(file, "a") as out:
                    out.write(" ".join(map(str, [step, *batch["id"]])) + "\n")
                yield batch

        return inputs._replace(train=batches)

    return wrapped


if __name__ == "__main__":
    ids_file, workdir = sys.argv[1:]
    data.OpenedData.batches = recording(data.OpenedData.batches, ids_file)
    sys.exit(cli.guarded(lambda: loop.train(small_config(), workdir)))
