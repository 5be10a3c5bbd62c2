"""A run: config, workdir, train step and inputs, and its initial state."""

import collections
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from mae_jax import methods, param_tree, recipe_version
from mae_jax.config import fitting_mesh, resolved, validate, with_fitting_mesh
from mae_jax.durations import Timeline
from mae_jax.errors import UserError
from mae_jax.methods.base import Batch, Method
from mae_jax.runtime import progress, sharding, startup_timer
from mae_jax.state import TrainState
from mae_jax.storage import paths, vocabulary
from mae_jax.training import optim, warm_shape, warm_start, workdir
from mae_jax.training.train_step import TrainStep

logger = logging.getLogger(__name__)
CACHE = "jax_compilation_cache_dir"


class Run(NamedTuple):
    """The fixed parts of a run."""

    config: ConfigDict  # as in config.json, with 'auto' unresolved: a run may be resumed on other devices
    workdir: epath.Path
    program: TrainStep
    inputs: Any  # data.Inputs; mae_jax.data is imported only where inputs are built

    @property
    def timeline(self) -> Timeline:
        """The periods of training in steps, such as the total, warm-up and evaluation interval."""
        return self.program.method.timeline


def prepare(config: ConfigDict, folder: epath.Path, for_training: bool = True) -> Run:
    """Checks the config, opens the data and builds the method. Writes nothing.

    Args:
      config: as in config.json, with 'auto' unresolved.
      folder: the workdir.
      for_training: False to use the encoder only: data need neither labels nor the fields of the loss.

    Raises:
      UserError: the config is invalid, or does not fit the data.
    """
    from mae_jax import data

    validate(config, for_training)
    here = resolved(config)
    mesh = fitting_mesh(here)
    if for_training:
        if methods.get(config.method.name).uses_labels:
            data.check_apart(here.data, "train_split", "eval_split")
        method, dataset = methods.with_data(here)
    else:
        dataset = data.OpenedData(here)
        method = methods.build(here, dataset.info)
    if not for_training and method.extra_encode_fields:
        raise UserError(f"a run of method.name={config.method.name} has no single encoder; extract one with "
                        "mae_jax export --for-task=vote")
    spec = method.eval_spec() if for_training else Method.eval_spec(method)
    inputs = dataset.batches(spec, method.patch_order(), method.views() if for_training else (),
                             sharding.local_rows(mesh, config.batch_size))
    logger.info(inputs.description)
    if method.timeline.total < 1:
        raise UserError(f"train.duration={config.train.duration!r} is less than one step: {inputs.num_train} examples, "
                        f"batch_size={config.batch_size}")
    if for_training:
        method.check_data()
        if method.task == "classification" and method.uses_labels and "labels" not in spec:
            dataset.check_labels()
        if method.task == "segmentation":
            dataset.check_masks(method.classes)
        if method.task == "detection":
            dataset.warn_of_sizes()
        if unread := optim.unread(config):
            logger.info("not read by optim.name=%s: %s", config.optim.name, ", ".join(unread))
    return Run(_decided(config, dataset), folder, TrainStep(method, mesh), inputs)


def _decided(config: ConfigDict, dataset: Any) -> ConfigDict:
    """Returns the config with data.range='auto' replaced by the range of the data, so that a resumed run keeps it."""
    if config.data.range == "auto" and recipe_version.has(config, "range_of_16_bits"):
        config = config.copy_and_resolve_references()
        config.data.range = dataset.config.data.range
    return config


def device_batches(run: Run, start: int) -> Iterator[Batch]:
    """Yields the global batches of steps start, start + 1, ..., on the devices; prefetches `data.prefetch` batches."""
    ready: collections.deque[Batch] = collections.deque()
    for batch in run.inputs.train(start):
        ready.append(sharding.to_devices(batch, run.program.mesh, run.config.batch_size))
        if len(ready) > run.config.data.prefetch:
            yield ready.popleft()


def images_on_host(run: Run) -> Iterator[dict[str, np.ndarray]]:
    """Yields global batches of the training split without augmentation, as NumPy arrays, the same on every process."""
    everywhere = sharding.replicated(run.program.mesh)
    for batch in run.inputs.support():
        placed = sharding.to_devices(batch, run.program.mesh, run.config.batch_size)
        yield jax.device_get(jax.device_put(placed, everywhere))


def initial_state(run: Run, for_training: bool = True, meanwhile: Callable[[], None] | None = None) -> TrainState:
    """Returns the state before the first step, with the parameters of `init_from` if it is set.

    Args:
      run: the run.
      for_training: False to use the encoder only: nothing is computed from training images.
      meanwhile: starts background work; called after `init_from` has been read and checked.

    Raises:
      UserError: `init_from` or a stored vocabulary cannot be used.
    """
    loaded = warm_start.load(run.config, run.program.state.params, run.inputs.classes) if run.config.init_from else {}
    if meanwhile:
        meanwhile()
    rows = len(sharding.local_rows(run.program.mesh, run.config.batch_size))
    batch = next(run.inputs.train(0)) if for_training else {
        name: np.zeros((rows, *struct.shape[1:]), struct.dtype) for name, struct in run.program.batch.items()}
    state = run.program.init(sharding.to_devices(batch, run.program.mesh, run.config.batch_size))
    if run.config.init_from:
        merged, report = param_tree.merge(state.params, loaded)
        logger.info("init_from %s: %s", run.config.init_from, report)
        state = state._replace(params=merged, ema=jax.tree.map(lambda x: x.copy(), merged) if state.ema else {})
    pictures = images_on_host(run) if for_training else None
    stored = run.program.method.stored_vocabulary() if for_training else None
    extras = {**state.extras, "vocabulary": vocabulary.load(*stored)} if stored else state.extras
    fitted = run.program.method.fit_extras(state.params, extras, pictures)
    if fitted is not state.extras:
        state = state._replace(extras=param_tree.place(fitted, state.extras))
    return state


def open_run(config: ConfigDict, folder: str, for_training: bool = True) -> Run:
    """Finds the devices, opens the data and returns the run of a config in a workdir. Writes nothing.

    For the arguments and errors see `prepare`; changes of a resumed run are checked and logged.
    """
    path = paths.locate_checkpoints(folder, "--workdir")
    with progress.doing("finding the devices"):
        jax.devices()
    startup_timer.done("devices")
    with progress.doing("opening the data"):
        run = prepare(warm_shape.with_shape(workdir.continued(path, config)), path, for_training)
    log_changes(workdir.changes(path, run.config, run.inputs) + data_changes(run))
    startup_timer.done("data")
    return run


def data_changes(run: Run) -> list[str]:
    """Returns the differences of the data from those of the stored run; raises UserError for other classes."""
    return workdir.data_changes(run.workdir, run.inputs, run.program.method.has_class_head)


def log_changes(changes: list[str]) -> None:
    """Logs each change of a resumed run."""
    for change in changes:
        logger.info("changed since the run began: %s", change)


@contextlib.contextmanager
def compiled_programs(config: ConfigDict, folder: epath.Path) -> Iterator[None]:
    """Sets JAX's compilation cache to train.compilation_cache; 'auto' is JAX's own setting, or else the workdir.

    Cached programs are executed. For safety, only a training run uses the cache in its workdir; commands that inspect a
    workdir do not.
    """
    place = config.train.compilation_cache
    before = getattr(jax.config, CACHE)
    if place == "auto":
        place = before or str(folder / "compiled")
    jax.config.update(CACHE, paths.normalized(place) or None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(CACHE, before)
        compilation_cache.reset_cache()


def config_for_inspection(path: epath.Path) -> ConfigDict:
    """Returns the stored config of a workdir, for inspecting the run.

    If the stored group `mesh` does not fit these devices, the default mesh replaces it, so that a run on many devices,
    or one that reduces gradients in bfloat16, can be inspected on others.
    """
    return with_fitting_mesh(workdir.read_config(path))
