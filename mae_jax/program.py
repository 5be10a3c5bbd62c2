"""A config on a mesh: where everything lives, and the compiled functions that loop, bench, replay and plan share."""

import math
from functools import partial

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import methods, optim, sharding
from mae_jax.config import for_platform
from mae_jax.errors import UserError
from mae_jax.ops.layout import ROWS
from mae_jax.step import init_state, make_train_step


class Program:
    """All that is fixed once the config, the mesh and the number of training examples are known.

    Calls of `init` and `step`, and whatever else runs the models, belong inside `jax.set_mesh(program.mesh)`.

    Attributes:
      state: the train state's shapes, each with its sharding.
      batch: the global batch's shapes, each with its sharding.
      init: batch → state before the first step, jitted; no array exists whole where its sharding cuts it.
      step: (state, batch) → (state, metrics), jitted, donating the state.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, examples: int):
        jax.config.update("jax_threefry_partitionable", True)  # what is drawn must not depend on the mesh
        config = for_platform(config, mesh.devices.flat[0].platform)
        self.config, self.mesh = config, mesh
        self.method = methods.get(config.method.name)(config, examples)
        if config.train.accumulate > 1 and self.method.sees_whole_batch:
            raise UserError(f"train.accumulate={config.train.accumulate}: the loss of {config.method.name} has terms "
                            "across the whole batch, which micro-batches would change; use 1")
        parts = config.train.accumulate * math.prod(mesh.shape[axis] for axis in ROWS)
        rows, step = config.batch_size // parts, parts * self.method.group
        if rows % self.method.group:
            near = [str(n) for n in (config.batch_size // step * step, config.batch_size // step * step + step) if n]
            raise UserError(f"batch_size={config.batch_size} gives a device {rows} rows at a time, which is not a "
                            f"multiple of the {self.method.group} pictures that {config.method.name} mixes; nearest: "
                            f"{' and '.join(near)}")
        self.optimizer = optim.make_optimizer(config, self.method, examples)
        self.schedule = optim.make_schedule(config, examples)
        initial = partial(init_state, config, self.method, self.optimizer)
        spec = self.method.batch_spec()
        shapes = jax.eval_shape(initial, spec)
        placed = sharding.param_shardings(mesh, shapes)
        self.state = sharding.with_shardings(shapes, placed)
        self.batch = sharding.with_shardings(spec, sharding.batch_sharding(mesh))
        self.init = jax.jit(initial, out_shardings=placed)
        self.step = jax.jit(make_train_step(config, self.method, self.optimizer, self.schedule),
                            donate_argnums=0, out_shardings=(placed, sharding.replicated(mesh)),
                            compiler_options={"xla_gpu_deterministic_ops": config.train.deterministic})

    def compile(self) -> None:
        """Compiles `step`, so that its first call runs at once."""
        self.step.lower(self.state, self.batch).compile()
