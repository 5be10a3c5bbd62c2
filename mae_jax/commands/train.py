r"""Trains, evaluates or replays a config in a workdir.

  mae_jax train --config=quickstart --workdir=runs/quickstart
  mae_jax train --config=vit_l_mae --workdir=gs://bucket/vit_l --config.optim.lr=1e-4
  mae_jax train --config=vit_l_mae --workdir=/shared/vit_l \
      --coordinator=10.0.0.1:7654 --processes=2 --process=0   # and --process=1 on the other host
  mae_jax eval --workdir=runs/quickstart   # with --config, its eval.* may be other ones

The same command resumes a run that was stopped; `python -m mae_jax.main` takes the same flags. On several hosts, start
it on each; under srun and on TPU VMs the processes find each other without flags. Exit codes: 0 finished, 2 your
mistake (one line names it), 3 stopped by a guard, 75 stopped by a signal with the state saved: start it again, 134
another process was lost: start all again, 1 a bug.
"""


from absl import flags

from mae_jax.commands import cli
from mae_jax.runtime import launch, progress, startup_timer

REQUIRED = ("workdir",)
CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", "", "folder of the run, local or gs://; the same for all processes")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "replay"],
                         "train; eval: evaluate a workdir's newest checkpoint; replay: inspect one step's gradients")
STEP = flags.DEFINE_integer("step", -1, "step of --mode=replay, from 0: the number in the log less 1; -1: the "
                            "last one", lower_bound=-1)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "compile the train step, print how it would run, and write nothing")


def main() -> int:
    with progress.doing("starting"):
        from mae_jax import config
        from mae_jax.errors import UserError
        from mae_jax.training import loop

    startup_timer.done("imports")
    if MODE.value == "replay" and CONFIG.value is not None:
        raise UserError("--mode=replay reads the workdir's config; leave --config out")
    if MODE.value != "train" and DRY_RUN.value:
        raise UserError(f"--dry_run compiles the train step; leave it out with --mode={MODE.value}")
    if MODE.value == "train" and CONFIG.value is None:
        raise UserError("--config must be given to train; --help shows an example")
    if MODE.value == "replay" and launch.here():
        raise UserError("--mode=replay runs in one process; use --coordinator=off")
    if CONFIG.value is not None and launch.here():
        config.validate(CONFIG.value)  # before the processes connect
    same = {"--workdir": WORKDIR.value, "--mode": MODE.value, "--dry_run": DRY_RUN.value}

    def command() -> int:
        if MODE.value == "eval":
            return loop.evaluate(WORKDIR.value, CONFIG.value)
        if MODE.value == "replay":
            from mae_jax.training import replay

            return replay.replay(WORKDIR.value, STEP.value)
        return (loop.dry_run if DRY_RUN.value else loop.train)(CONFIG.value, WORKDIR.value)

    return launch.run(command, same, CONFIG.value)
