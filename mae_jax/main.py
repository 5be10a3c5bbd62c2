"""Trains, evaluates or replays a config in a workdir.

  python -m mae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m mae_jax.main --config=configs/vit_l_mae.py --workdir=gs://bucket/vit_l --config.optim.lr=1e-4
  python -m mae_jax.main --mode=eval --workdir=runs/quickstart

The same command resumes a run that was stopped. Exit codes: 0 finished, 2 your mistake (one line says which),
3 stopped by a guard, 75 stopped by a signal with the state saved: start it again, 1 a bug.
"""

from absl import flags

from mae_jax import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", "", "folder of the run, local or gs://")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "replay"],
                         "train; eval: evaluate a workdir's newest checkpoint; replay: look into one step's gradients")
STEP = flags.DEFINE_integer("step", -1, "the step that --mode=replay looks into; -1: the last one taken")


def main() -> int:
    from mae_jax import train
    from mae_jax.errors import UserError

    if MODE.value != "train" and CONFIG.value is not None:
        raise UserError(f"--mode={MODE.value} reads the config that the workdir was made with; leave --config out")
    if MODE.value == "eval":
        return train.evaluate(WORKDIR.value)
    if MODE.value == "replay":
        from mae_jax import replay

        return replay.replay(WORKDIR.value, STEP.value)
    if CONFIG.value is None:
        raise UserError("--config must be given to train; --help shows an example")
    return train.train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    cli.run(main, __doc__, required=("workdir",))
