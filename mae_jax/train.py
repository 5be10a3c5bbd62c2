"""The loop: restore, step, log, evaluate, save, stop cleanly. Nothing method-specific."""

import collections
import contextlib
import logging
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from mae_jax import cli, distributed, files, judge, lease, methods, optim, params, phases, sharding, warm_start, workdir
from mae_jax.checkpoint import Checkpoints
from mae_jax.config import default, profile_steps, validate
from mae_jax.durations import steps
from mae_jax.errors import GuardError, UserError
from mae_jax.log import Log
from mae_jax.methods.base import Batch, Metrics
from mae_jax.metrics import Recorder, say
from mae_jax.program import Program
from mae_jax.step import TrainState
from mae_jax.stop import Stopper
from mae_jax.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """All that is fixed once config and data are known."""

    config: ConfigDict
    workdir: epath.Path
    program: Program
    inputs: Any  # data.Inputs; data/ is imported only where the input is built
    total: int  # steps

    def every(self, group: str, field: str = "every") -> int:
        """Returns a period of the config in steps, at least 1; 0 where it is off."""
        duration = self.config[group][field]
        return max(1, steps(duration, self.config.batch_size, self.inputs.num_train)) if duration else 0


def prepare(config: ConfigDict, folder: epath.Path, trains: bool = True) -> Run:
    """Checks the config, opens the data and builds the method; raises UserError before anything is written.

    Args:
      config: the resolved config.
      folder: the workdir.
      trains: False where the encoder alone is looked at: data of any labels, or without what the loss needs, will do.
    """
    from mae_jax import data

    validate(config, trains)
    mesh = sharding.make_mesh(config)
    method = methods.get(config.method.name)(config)
    if not trains and method.encodes_with:
        raise UserError(f"a run of method.name={config.method.name} has no single encoder to look at; python -m "
                        "mae_jax.export --for-task=vote makes one")
    if trains and method.learns_labels:
        data.check_apart(config.data, "train_split", "eval_split")
    spec = method.eval_spec() if trains else methods.Method.eval_spec(method)
    rows = sharding.local_rows(mesh, config.batch_size)
    inputs = data.build(config, spec, method.order(), rows, method.views() if trains else ())
    logger.info(inputs.description)
    total = steps(config.train.duration, config.batch_size, inputs.num_train)
    if total < 1:
        raise UserError(f"train.duration={config.train.duration!r} is less than one step: {inputs.num_train} examples, "
                        f"batch_size={config.batch_size}")
    fitted = type(method).fitted(config, inputs.classes) if trains else config
    program = Program(fitted, mesh, inputs.num_train)
    return Run(config, folder, program, inputs, total)


def device_batches(run: Run, start: int) -> Iterator[Batch]:
    """Yields the global batches of steps start, start + 1, ...; `data.prefetch` of them are on their way ahead."""
    ready: collections.deque[Batch] = collections.deque()
    for batch in run.inputs.train(start):
        ready.append(sharding.to_devices(batch, run.program.mesh, run.config.batch_size))
        if len(ready) > run.config.data.prefetch:
            yield ready.popleft()


def pictures_on_host(run: Run) -> Iterator[Batch]:
    """Yields the training split as evaluations see it, whole global batches of NumPy arrays, on all processes alike."""
    everywhere = sharding.replicated(run.program.mesh)
    for batch in run.inputs.support():
        batch = sharding.to_devices(batch, run.program.mesh, run.config.batch_size)
        yield jax.device_get(jax.device_put(batch, everywhere))


def initial_state(run: Run, trains: bool = True) -> TrainState:
    """Makes the state before the first step, from `init_from` where it is given.

    Args:
      run: as `prepare` made it.
      trains: False where the encoder alone is looked at: nothing is then computed of training pictures.
    """
    loaded = warm_start.load(run.config, run.program.state.params) if run.config.init_from else {}
    rows = len(sharding.local_rows(run.program.mesh, run.config.batch_size))
    batch = next(run.inputs.train(0)) if trains else {
        name: np.zeros((rows, *struct.shape[1:]), struct.dtype) for name, struct in run.program.batch.items()}
    state = run.program.init(sharding.to_devices(batch, run.program.mesh, run.config.batch_size))
    if run.config.init_from:
        merged, report = params.merge(state.params, loaded)
        logger.info("init_from %s: %s", run.config.init_from, report)
        state = state._replace(params=merged, ema=jax.tree.map(lambda x: x.copy(), merged) if state.ema else {})
    pictures = pictures_on_host(run) if trains else None
    fitted = run.program.method.fit(state.params, state.extras, pictures)
    if fitted is not state.extras:
        state = state._replace(extras=params.place(fitted, state.extras))
    return state


def train(config: ConfigDict, folder: str) -> int:
    """Trains until `train.duration`, resuming what the workdir holds. Returns the exit code."""
    phases.begin()
    with Stopper() as stopper:
        run = opened(config, folder)
        finished = distributed.first(workdir.finished(run.workdir))
        if finished >= run.total:
            say(f"{run.workdir} is finished: step {finished} of {run.total}; a longer train.duration goes on")
            return cli.FINISHED
        watchdog = Watchdog(config.guard.stall_seconds, run.workdir)
        compiled = compiled_programs(config, run.workdir)
        with lease.held(run.workdir), jax.set_mesh(run.program.mesh), compiled, watchdog:
            return resume(run, stopper, watchdog)


def opened(config: ConfigDict, folder: str, trains: bool = True) -> Run:
    """Returns the run of a config in a workdir, after all checks that need no device; nothing is written.

    Args: as of `prepare`.
    """
    path = files.locate(folder)
    jax.devices()
    phases.done("devices")
    run = prepare(config, path, trains)
    _tell(workdir.changes(path, config) + data_changes(run))
    phases.done("data")
    return run


def data_changes(run: Run) -> list[str]:
    """Returns how the data are other ones than those that the run began with; raises UserError for other classes."""
    return workdir.data_changes(run.workdir, run.inputs, run.program.method.names_classes)


def _tell(changes: list[str]) -> None:
    for change in changes:
        logger.info("changed since the run began: %s", change)


@contextlib.contextmanager
def compiled_programs(config: ConfigDict, folder: epath.Path) -> Iterator[None]:
    """Keeps compiled programs where train.compilation_cache says; 'auto' where JAX was told, or else in the workdir.

    What is read there is executed. So only a run reads its own workdir's, and no command that looks into a workdir.
    """
    place = config.train.compilation_cache
    before = jax.config.jax_compilation_cache_dir
    if place == "auto":
        place = before or str(folder / "compiled")
    jax.config.update("jax_compilation_cache_dir", place or None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def resume(run: Run, stopper: Stopper, watchdog: Watchdog) -> int:
    """Restores or makes the state and trains on. Returns the exit code."""
    config, folder = run.config, run.workdir
    judge.check(run)
    checkpoints = Checkpoints(folder, config.checkpoint.keep_last, run.every("checkpoint", "keep_every"))
    watchdog.on("reading the checkpoint")
    state = checkpoints.restore(run.program.state)
    watchdog.on("")
    if state is None:
        if finished := distributed.first(workdir.finished(folder)):
            raise UserError(f"{folder} is of a run that finished {finished} steps, and has no checkpoint to go on "
                            "from; bring its folder checkpoints back, or use another --workdir")
        state = initial_state(run)
        say(params.table(state.params, optim.decay_words(state.params, run.program.method)))
    elif int(state.step) > run.total:
        raise UserError(f"{folder} is at step {int(state.step)}, past train.duration={config.train.duration!r} "
                        f"({run.total} steps)")
    else:
        run.program.method.check(state.extras)
        logger.info("resumed at step %d", state.step)
    phases.done("state")
    workdir.record(folder, config, run.inputs)  # not before all that a mistake can break has worked
    recorder = Recorder(folder, int(state.step), config.log.tensorboard, jax.process_index() == 0)
    try:
        code = loop(run, state, checkpoints, recorder, stopper, watchdog)
    except BaseException:
        if not distributed.peers():  # else the others may not come to wait for the last save
            checkpoints.close()
        raise
    finally:
        recorder.close()
    checkpoints.close()
    return code


def dry_run(config: ConfigDict, folder: str) -> int:
    """Compiles the train step and says how the run would be laid out; writes nothing. Returns the exit code."""
    run = opened(config, folder)
    mesh, rows = run.program.mesh, sharding.local_rows(run.program.mesh, config.batch_size)
    with jax.set_mesh(mesh):
        run.program.compile()
    phases.done("compile")
    kinds = sorted({device.device_kind for device in jax.devices()})
    processes = jax.process_count()
    say(f"{jax.device_count()} devices ({', '.join(kinds)}) of {processes} process{'es' if processes > 1 else ''}")
    say(f"mesh: {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}")
    shares = distributed.gather(f"{len(rows)} rows of {config.batch_size}, {jax.local_device_count()} devices")
    for number, share in enumerate(shares):
        say(f"process {number}: {share}")
    say(f"{run.total} steps; compiled after {phases.summary()}")
    return cli.FINISHED


class Profile:
    """Writes a profiler trace of the steps `log.profile_steps` = 'first:last' to <workdir>/profile."""

    def __init__(self, run: Run):
        self.first, last = profile_steps(run.config)
        self.last, self.running = min(last, run.total), False
        self.folder = str(run.workdir / "profile")

    def before(self, done: int) -> None:
        if done == self.first:
            jax.profiler.start_trace(self.folder)
            self.running = True

    def after(self, done: int, metrics: Metrics) -> None:
        if self.running and done == self.last:
            self.running = False
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            logger.info("profile of steps %d to %d: %s", self.first, self.last, self.folder)


def loop(run: Run, state: TrainState, checkpoints: Checkpoints, recorder: Recorder, stopper: Stopper,
         watchdog: Watchdog) -> int:
    """Steps from the state's step to the end. Returns the exit code."""
    start, total = int(state.step), run.total
    judged, log, profile = judge.Judge(run, recorder), Log(run, recorder), Profile(run)
    save_every = run.every("checkpoint")
    if judged.missed(start):
        watchdog.on(f"the evaluation at step {start}")
        judged.look(state, start)
        watchdog.on("")
        phases.done("evaluation")
    run.program.compile()
    phases.done("compile")
    batches = device_batches(run, start)
    log.speed.start()
    for done in range(start + 1, total + 1):
        watchdog.on(f"the input of step {done}")
        batch = log.speed.waiting(lambda: next(batches))
        watchdog.on(f"step {done}")
        profile.before(done)
        state, metrics = run.program.step(state, batch)
        profile.after(done, metrics)
        stopper.stepped()
        lease.fence()
        if done == start + 1:
            jax.block_until_ready(metrics)
            phases.done("first step")
            logger.info("time to first step %s", phases.summary())
            log.speed.start()
        stop = stopper.should_stop(done)
        look = judged.due(done)
        # Also before an evaluation: a signal can then end it at once.
        save = look or done == total or (save_every > 0 and done % save_every == 0)
        try:
            log.push(done, metrics, batch["id"])
            if save or stop:
                log.drain()
        except GuardError:
            _keep_config(run)
            checkpoints.save(done, state)
            checkpoints.wait()
            raise
        if save or stop:
            _keep_config(run)
            watchdog.on(f"the save of step {done}")
            checkpoints.save(done, state)
        if stop and done < total:
            return finish(run, checkpoints, state, done)
        if look:
            checkpoints.wait()
            if not checkpoints.failed:
                stopper.saved()
            watchdog.on(f"the evaluation at step {done}")
            judged.look(state, done)
            log.speed.start()
    return finish(run, checkpoints, state, total)


def _keep_config(run: Run) -> None:
    if jax.process_index() == 0:
        workdir.keep(run.workdir, run.config, run.inputs)


def finish(run: Run, checkpoints: Checkpoints, state: TrainState, done: int) -> int:
    """Waits for the last save, tries it again if it failed, and says how the run ended. Returns the exit code."""
    checkpoints.wait()
    if checkpoints.failed:  # perhaps by what was over a moment later, and no other save comes
        checkpoints.save(done, state)
        checkpoints.wait()
    if checkpoints.failed:
        raise UserError(f"the state of step {done} could not be saved: {checkpoints.failed}; mend that and run the "
                        f"same command: it goes on from step {checkpoints.latest() or 0}")
    if done < run.total:
        say(f"stopped at step {done} of {run.total}, state saved; the same command goes on")
        return cli.STOPPED
    lease.fence()
    if jax.process_index() == 0:
        if why := lease.doubt():
            raise UserError(f"the end of the run is not on record: {why}")
        files.replace_text(run.workdir / "DONE", f"{done}\n")
    say(f"finished {done} steps; {run.workdir}")
    return cli.FINISHED


def of_workdir(path: epath.Path) -> ConfigDict:
    """Returns the config that a workdir was made with, to look at the run: its mesh gives way where it does not fit.

    What was trained on many devices can be looked at on one, and what was summed in bfloat16 where that is not done.
    """
    config = workdir.read_config(path)
    try:
        sharding.make_mesh(config)
    except UserError:
        config.mesh = default(config.method.name).mesh
        logger.info("the mesh of the run does not fit here; looking at it with all devices along mesh.data")
    return config


def evaluate(folder: str, config: ConfigDict | None = None) -> int:
    """Evaluates the newest checkpoint of a workdir on its evaluation split. Returns the exit code.

    Args:
      folder: the workdir.
      config: the one it was made with, but for fields that a resumed run may change; None: the very one.
    """
    path = files.locate(folder)
    if config is None:
        config = of_workdir(path)
    else:
        workdir.compare(workdir.read_config(path), config)
    run = prepare(config, path)
    _tell(data_changes(run))
    if not run.config.data.eval_split or not run.config.eval.test:
        raise UserError("data.eval_split is '', or eval.test is False: there is nothing to evaluate on")
    checkpoints = Checkpoints(path, run.config.checkpoint.keep_last)
    state = checkpoints.restore(run.program.state)
    if state is None:
        raise UserError(f"{path} holds no checkpoint yet")
    run.program.method.check(state.extras)
    # Lines past this step stay: they may be those of a run in progress.
    recorder = Recorder(path, math.inf, run.config.log.tensorboard, jax.process_index() == 0)
    with jax.set_mesh(run.program.mesh):
        judged, began = judge.Judge(run, recorder), time.monotonic()
        judged.write(state, int(state.step), judged.at_the_end(state, {}), began)
    recorder.close()
    checkpoints.close()
    return cli.FINISHED
