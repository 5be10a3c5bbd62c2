"""A figure of the batch that a run begins with, as the model sees it."""

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
    """Draws the first eval.pictures images of the first step; called on every process.

    Args:
      run: what is trained.
      batch: of its first step, on the devices.

    Returns:
      uint8 [height, width, 3]; None, with one warning, where it cannot be drawn: no figure is worth a run.
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
    except Exception as error:  # of a plug-in's method, perhaps
        logger.warning("no figure of the first batch: %s", str(error).split("\n")[0] or type(error).__name__)
        return None


def rows_trained_on(method: Method, count: int, sharding: jax.sharding.Sharding) -> Callable[[Batch], Batch]:
    """Returns, compiled, batch → its first rows, of the first micro-batch where there are several, on every device.

    Where the method changes images on the device, `augmented` is what it makes of them: normalised, float32.
    """
    parts, seed = method.config.train.accumulate, method.config.seed

    def rows(batch: Batch) -> Batch:
        key = stream_key(seed, jnp.zeros((), jnp.int32), "loss")  # as the train step draws it
        if parts > 1:
            batch = jax.tree.map(lambda x: split_microbatches(x, parts, method.group)[0], batch)
            key = jax.random.fold_in(key, 0)
        augmented = method.device_augmented(batch, key)
        return {name: value[:count] for name, value in
                {**batch, **({} if augmented is None else {"augmented": augmented})}.items()}

    return jax.jit(rows, out_shardings=sharding)
