"""Replay of one step, to find the images and parameters whose loss or gradient is not finite."""

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax import errors, param_tree
from mae_jax.errors import UserError
from mae_jax.methods.base import Batch
from mae_jax.ops.example_ids import whole
from mae_jax.rng import stream_key
from mae_jax.runtime import sharding
from mae_jax.state import TrainState
from mae_jax.storage import paths
from mae_jax.storage.checkpoint import Checkpoints
from mae_jax.training.run import Run, config_for_inspection, prepare
from mae_jax.training.train_step import gradients


def replay(folder: str, step: int) -> int:
    """Computes loss and gradients of a step with the newest checkpoint, and prints what is not finite.

    Non-finite steps do not change the parameters: the checkpoint that is saved when the guard stops a run has the
    parameters with which these steps began.

    Args:
      folder: the workdir.
      step: the step; negative: the last step before the checkpoint.

    Returns:
      The exit code.

    Raises:
      UserError: there is no checkpoint, or the step is after it.
    """
    path = paths.locate_checkpoints(folder, "--workdir")
    run = prepare(config_for_inspection(path), path)
    state = Checkpoints(path, run.config.checkpoint.keep_last).restore(run.program.state)
    if state is None:
        raise UserError(f"{path} has no checkpoint yet")
    saved = int(state.step)
    step = saved - 1 if step < 0 else step
    if step > saved:
        raise UserError(f"--step={step} cannot be replayed: {path} is at step {saved}")
    batch = sharding.to_devices(next(run.inputs.train(step)), run.program.mesh, run.config.batch_size)
    state = state._replace(step=jnp.asarray(step, state.step.dtype))
    key = stream_key(run.config.seed, step, "loss")
    method, parts = run.program.method, run.config.train.accumulate
    compute = jax.jit(lambda state, batch: gradients(method, state, batch, key, parts))
    with jax.set_mesh(run.program.mesh):
        grads, metrics, _ = jax.device_get(compute(state, batch))
    print(f"step {step} with the parameters saved at step {saved}: "
          + "  ".join(f"{name} {total / max(weight, 1e-30):.6g}" for name, (total, weight) in metrics.items()))
    bad = [name for name, grad in param_tree.flatten(grads).items() if not np.isfinite(grad).all()]
    print(f"parameters whose gradient is not finite: {', '.join(bad) or 'none'}")
    print(f"examples whose loss is not finite: {', '.join(_bad_examples(run, state, batch)) or 'none'}")
    return errors.FINISHED


def _bad_examples(run: Run, state: TrainState, batch: Batch) -> list[str]:
    """Returns the ids of the images whose loss, evaluated one image at a time, is not finite.

    Images of a group, which share an order of patches, are evaluated together: all of them are returned.
    """
    key, group = stream_key(run.config.seed, int(state.step), "loss"), run.program.method.group

    @jax.jit
    def alone(row: jax.Array) -> jax.Array:
        one = {name: jax.lax.dynamic_slice_in_dim(value, row, group) for name, value in batch.items()}
        return run.program.method.loss(state.params, state.extras, one, key, state.step, False)[0]

    ids = whole(batch["id"])
    bad = [row for row in range(0, run.config.batch_size, group) if not np.isfinite(alone(row))]
    return [str(number) for row in bad for number in ids[row:row + group]]
