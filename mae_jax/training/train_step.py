"""The jitted train step, and the sharding of its state."""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import methods
from mae_jax.config import fitting_mesh, for_platform
from mae_jax.data.info import DataInfo
from mae_jax.errors import UserError
from mae_jax.methods.base import Batch, Extras, Method, Metrics, Params
from mae_jax.ops.partitioning import ROWS
from mae_jax.param_tree import path
from mae_jax.rng import stream_key
from mae_jax.runtime import exit, progress, sharding
from mae_jax.state import TrainState
from mae_jax.training import optim, spike_detector
from mae_jax.training.optim import Schedule

# By default, XLA merges matrix products with a common operand, such as those for queries, keys and values, and then
# copies the parts of the result for cuDNN.
COMPILER_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}
T = TypeVar("T")
Updated = tuple[Params, Any, Params, Extras]  # parameters, optimizer state, EMA, extras


class TrainStep:
    """The compiled functions and shardings of a method on a mesh.

    Call `init`, `step` and other functions of the models inside `jax.set_mesh(program.mesh)`.

    Attributes:
      method, mesh: as given.
      optimizer: the optimizer without the learning rate, see `optim.make_optimizer`.
      schedule: step → learning rate.
      state: tree of ShapeDtypeStruct of the train state, with shardings.
      batch: name → ShapeDtypeStruct of the global batch, with shardings.
      init: batch → state before the first step, jitted; sharded arrays are never materialized whole.
      step: (state, batch) → (state, metrics), jitted; donates the state.
    """

    def __init__(self, method: Method, mesh: Mesh):
        """Raises UserError if the batch cannot be split into the mesh's devices, or into micro-batches."""
        jax.config.update("jax_threefry_partitionable", True)  # random numbers must not depend on the mesh
        self.method, self.mesh, config = method, mesh, method.config
        if config.train.accumulate > 1 and method.loss_spans_batch:
            raise UserError(f"train.accumulate={config.train.accumulate}: the loss of {config.method.name} has terms "
                            "across the images of a batch, which micro-batches would change; use 1")
        parts = config.train.accumulate * math.prod(mesh.shape[axis] for axis in ROWS)
        rows, step = config.batch_size // parts, parts * method.group
        if rows % method.group:
            near = [str(n) for n in (config.batch_size // step * step, config.batch_size // step * step + step) if n]
            raise UserError(f"batch_size={config.batch_size} gives a device {rows} rows at a time, which is not a "
                            f"multiple of the {method.group} images that {config.method.name} mixes; nearest: "
                            f"{' and '.join(near)}")
        self.optimizer = optim.make_optimizer(method)
        self.schedule = optim.make_schedule(method)
        initial = partial(init_state, method, self.optimizer)
        spec = method.batch_spec()
        shapes = jax.eval_shape(initial, spec)
        placed = sharding.param_shardings(mesh, shapes)
        self.state = sharding.with_shardings(shapes, placed)
        self.batch = sharding.with_shardings(spec, sharding.batch_sharding(mesh))
        self.init = jax.jit(initial, out_shardings=placed)
        self.step = jax.jit(build_train_step(method, self.optimizer, self.schedule),
                            donate_argnums=0, out_shardings=(placed, sharding.replicated(mesh)),
                            compiler_options=COMPILER_OPTIONS | {
                                "xla_gpu_deterministic_ops": config.train.deterministic})
        self._ahead: Future | None = None

    def compile_ahead(self, first: Callable[[], None] | None = None) -> None:
        """Starts to compile `step` in a thread, while the state is initialized and evaluated; `compile` waits for it.

        Does nothing on GPUs, where XLA selects kernels by timing them: other work would disturb the timing.

        Args:
          first: compiles what is needed before the first step; called in the thread before `step` is compiled.
        """
        if self.mesh.devices.flat[0].platform != "gpu":
            executor = ThreadPoolExecutor(1, "compile")
            self._ahead = executor.submit(self._compile, first)
            executor.shutdown(wait=False)  # the thread ends after its task; the interpreter joins it at exit

    def compile(self) -> None:
        """Compiles `step`, or waits for `compile_ahead`; raises the errors of the compilation."""
        with progress.doing("compiling the train step"):
            if self._ahead is None:
                self._compile()
            else:
                self._ahead.result()

    def leave(self) -> None:
        """Marks an unfinished `compile_ahead` as abandoned, so that `exit_process` does not join its thread."""
        if self._ahead and not self._ahead.done():
            exit.wait_for_no_thread()

    def _compile(self, first: Callable[[], None] | None = None) -> None:
        with jax.set_mesh(self.mesh):  # the mesh is a setting per thread
            if first:
                first()
            self.step.lower(self.state, self.batch).compile()


def build(config: ConfigDict, data: DataInfo, devices: list[jax.Device] | None = None) -> TrainStep:
    """Builds the train step of a config.

    Args:
      config: the config; 'auto' is resolved for the platform of the devices.
      data: properties of the data.
      devices: the devices; None: all.

    Raises:
      UserError: the config does not fit the devices or the method.
    """
    devices = jax.devices() if devices is None else devices
    config = for_platform(config, devices[0].platform)
    mesh = fitting_mesh(config, devices)
    return TrainStep(methods.build(config, data), mesh)


def init_state(method: Method, optimizer: optax.GradientTransformation, batch: Batch) -> TrainState:
    """Returns the state before the first step."""
    config = method.config
    params, extras = method.init(stream_key(config.seed, 0, "init"), batch)
    ema = jax.tree.map(jnp.copy, params) if config.optim.ema else {}
    zero = jnp.zeros((), jnp.int32)
    history = spike_detector.no_history(("loss", "grad_norm")) if config.guard.spike else ()
    return TrainState(zero, params, optimizer.init(params), extras, ema, jnp.copy(zero), history)


def gradients(method: Method, state: TrainState, batch: Batch, key: jax.Array,
              accumulate: int) -> tuple[Params, Metrics, Extras]:
    """Returns gradients, metrics and new extras of a batch, accumulated over `accumulate` micro-batches.

    Micro-batch j has rows j, j + accumulate, ... (or groups of rows), so that every device splits its own rows.
    Gradients are weighted by the weight of the loss: the result is the gradient of the whole batch, also with invalid
    rows.

    Args:
      method: the method.
      state: the train state; gradients are with respect to its params.
      batch: the global batch.
      key: key of the loss; if there are several micro-batches, number j uses fold_in(key, j).
      accumulate: number of micro-batches.
    """
    def loss(params: Params, *args: Any) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        if method.config.mesh.reduce == "bfloat16":  # gradients are reduced in the dtype of the kernels
            params = jax.tree_util.tree_map_with_path(
                lambda keys, leaf: leaf.astype(jnp.bfloat16) if path(keys).endswith("/kernel") else leaf, params)
        return method.loss(params, *args)

    def grad(batch: Batch, extras: Extras, key: jax.Array) -> tuple[Params, tuple[Metrics, Extras]]:
        return jax.grad(loss, has_aux=True)(state.params, extras, batch, key, state.step, True)

    if accumulate == 1:
        grads, (metrics, extras) = grad(batch, state.extras, key)
        return grads, metrics, extras
    parts = jax.tree.map(lambda x: split_microbatches(x, accumulate, method.group), batch)

    def one(carry: tuple[Params, Metrics, Extras], item: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        total, sums, extras = carry
        part, index = item
        grads, (metrics, extras) = grad(part, extras, jax.random.fold_in(key, index))
        total = jax.tree.map(lambda t, g: t + g * metrics["loss"][1], total, grads)
        return (total, jax.tree.map(jnp.add, sums, metrics), extras), None

    grads, (metrics, _) = jax.eval_shape(grad, jax.tree.map(lambda x: x[0], parts), state.extras, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, metrics))
    (total, metrics, extras), _ = jax.lax.scan(one, (*zeros, state.extras), (parts, jnp.arange(accumulate)))
    weight = jnp.maximum(metrics["loss"][1], 1)
    return jax.tree.map(lambda t: t / weight, total), metrics, extras


def split_microbatches(x: jax.Array, parts: int, group: int) -> jax.Array:
    """Splits [B, ...] into interleaved micro-batches [parts, B / parts, ...]; keeps groups of rows together."""
    return x.reshape(-1, parts, group, *x.shape[1:]).swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])


def build_train_step(method: Method, optimizer: optax.GradientTransformationExtraArgs,
                     schedule: Schedule) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the pure train step (state, batch) → (state, metrics), to be jitted.

    If the loss or a gradient is not finite, or guard.spike detects a spike, parameters, optimizer state, EMA and extras
    are unchanged bit for bit, for every optimizer. `state.step` still advances, so that the batch is not repeated.
    """
    config = method.config

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = stream_key(config.seed, state.step, "loss")
        grads, metrics, new_extras = gradients(method, state, batch, key, config.train.accumulate)
        norm = optim.global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0])
        apply_update, history, spike_metrics = skip_on_spike(config.guard.spike, finite, state, metrics, norm)
        lr, decay = schedule(state.step), config.optim.ema

        def advance(kept: Updated) -> Updated:
            params, opt, ema, _ = kept
            updates, opt = optimizer.update(grads, opt, params, step=state.step)
            params = jax.tree.map(lambda p, u: p - lr * u, params, updates)
            # In this form, the factors sum to 1: separately rounded, 0.9999 and 0.0001 would shrink the EMA by 1.7e-4.
            ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params) if decay else {}
            return params, opt, ema, method.after_update(params, new_extras, state.step)

        kept = (state.params, state.opt, state.ema, state.extras)
        params, opt, ema, extras = only_if(apply_update, advance, kept)
        bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
        one = jnp.ones((), jnp.float32)
        metrics = metrics | spike_metrics | {
            "lr": (lr, one),
            "grad_norm": (norm, one),
            "bad_steps": (bad_steps.astype(jnp.float32), one),
            "replaced": ((batch["replaced"] > 0).sum().astype(jnp.float32), one),
        }
        return TrainState(state.step + 1, params, opt, extras, ema, bad_steps, history), metrics

    return train_step


def only_if(apply_update: jax.Array, advance: Callable[[T], T], kept: T) -> T:
    """Returns `advance(kept)` if the update is applied, otherwise `kept`, bit for bit.

    Accelerators compute the new values and select, which is fused with the update. On CPUs, XLA would then copy the
    donated parameters and moments before overwriting them; a loop of one or zero iterations writes in place.

    Args:
      apply_update: bool [].
      advance: a pure function of a tree that returns one of the same structure, shapes and dtypes.
      kept: the tree.
    """
    def loop(apply_update: jax.Array, kept: T) -> T:
        return jax.lax.fori_loop(0, apply_update.astype(jnp.int32), lambda _, kept: advance(kept), kept)

    def choice(apply_update: jax.Array, kept: T) -> T:
        return jax.tree.map(lambda new, old: jnp.where(apply_update, new, old), advance(kept), kept)

    return jax.lax.platform_dependent(apply_update, kept, cpu=loop, default=choice)


def skip_on_spike(deviations: float, finite: jax.Array, state: TrainState, metrics: Metrics,
                  norm: jax.Array) -> tuple[jax.Array, Any, Metrics]:
    """Returns whether to apply the update (bool []), the new history, and the metric `spikes`.

    Args:
      deviations: guard.spike; 0: off.
      finite: bool [], whether loss and gradients are finite.
      state: the train state, with the history.
      metrics: the metrics of the step.
      norm: global norm of the gradients, float32 [].
    """
    if not deviations:
        return finite, (), {}
    values = {"loss": metrics["loss"][0] / jnp.maximum(metrics["loss"][1], 1), "grad_norm": norm}
    spike = finite & spike_detector.stands_out(state.history, values, deviations)
    history = spike_detector.remember(state.history, values, state.step)
    return finite & ~spike, history, {"spikes": (spike.astype(jnp.float32), jnp.ones((), jnp.float32))}
