"""A figure of the first training batch, after augmentation."""

import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.evals import input_grid
from mae_jax.methods.base import Batch, Method
from mae_jax.ops.patches import denormalize
from mae_jax.rng import stream_key
from mae_jax.runtime.sharding import replicated
from mae_jax.training.run import Run
from mae_jax.training.train_step import split_microbatches

logger = logging.getLogger(__name__)


def figure(run: Run, batch: Batch) -> np.ndarray | None:
    """Draws the first eval.pictures images of a batch; called on every process.

    Args:
      run: the run.
      batch: the global batch of its first step, on the devices.

    Returns:
      uint8 [height, width, 3]; None, with a warning, after any error: a figure must not stop a run.
    """
    method, config = run.program.method, run.config
    try:
        few = jax.device_get(rows_trained_on(method, -(-config.eval.pictures // method.group) * method.group,
                                             replicated(run.program.mesh))(batch))
        if "augmented" in few:
            few["augmented"] = np.clip(np.rint(denormalize(few["augmented"])), 0, 255).astype(np.uint8)
        part = run.inputs.parts.get(config.data.train_split)
        count = min(config.eval.pictures, len(few["id"]))
        captions = [input_grid.caption(few, i, run.inputs.classes, part) for i in range(count)]
        return input_grid.drawn(method, few, captions, "the first training batch, as the model sees it")
    except Exception as error:  # such as an error in the method of a plug-in
        logger.warning("no figure of the first batch: %s", str(error).split("\n")[0] or type(error).__name__)
        return None


def rows_trained_on(method: Method, count: int, sharding: jax.sharding.Sharding) -> Callable[[Batch], Batch]:
    """Returns a compiled function of a global batch that returns the first `count` rows of its first micro-batch.

    If the method augments images on the device, the rows have `augmented`, normalized pixels float32 [count, N, P].

    Args:
      method: the method.
      count: number of rows.
      sharding: sharding of the result.
    """
    parts, seed = method.config.train.accumulate, method.config.seed

    def rows(batch: Batch) -> Batch:
        key = stream_key(seed, jnp.zeros((), jnp.int32), "loss")  # the key of the train step
        if parts > 1:
            batch = jax.tree.map(lambda x: split_microbatches(x, parts, method.group)[0], batch)
            key = jax.random.fold_in(key, 0)
        augmented = method.device_augmented(batch, key)
        return {name: value[:count] for name, value in
                {**batch, **({} if augmented is None else {"augmented": augmented})}.items()}

    return jax.jit(rows, out_shardings=sharding)
