"""The training loop, for all methods: restore, step, log, evaluate, save, stop."""

import functools
import logging
import math
import time

import jax
from ml_collections import ConfigDict

from mae_jax import errors
from mae_jax.config import profile_steps
from mae_jax.errors import GuardError, UserError, pluralize
from mae_jax.evals.evaluator import Evaluator, missing
from mae_jax.methods.base import Batch, Metrics
from mae_jax.runtime import peers, progress, sharding, startup_timer
from mae_jax.runtime.console import print_once
from mae_jax.runtime.signals import NoSignals, SignalHandler, Stopper
from mae_jax.runtime.watchdog import Watchdog
from mae_jax.state import TrainState
from mae_jax.storage import disk, metric_sinks, paths, step_dirs, workdir_lock
from mae_jax.storage.checkpoint import Checkpoints
from mae_jax.storage.metric_writer import MetricWriter
from mae_jax.training import ending, evaluation, first_batch, next_steps, parameter_table, warm_start, workdir
from mae_jax.training.evaluation import PeriodicEvaluation
from mae_jax.training.run import (
    Run,
    compiled_programs,
    config_for_inspection,
    data_changes,
    device_batches,
    initial_state,
    log_changes,
    open_run,
    prepare,
)
from mae_jax.training.step_logger import StepLogger

logger = logging.getLogger(__name__)


def train(config: ConfigDict, folder: str, alone: bool = True) -> int:
    """Trains until `train.duration`, from the newest checkpoint of the workdir if there is one. Returns the exit code.

    Args:
      config: the config of the run.
      folder: the workdir.
      alone: False for one run of a series, which prints no next steps at its end, and returns `errors.STOPPED` if a
        signal came after its last step.
    """
    startup_timer.begin()
    with SignalHandler() as stopper:
        code = _train(config, folder, stopper, config.guard.stall_seconds, alone)
        # A signal after the last step leaves nothing to stop of this run, but the series must not go on.
        return errors.STOPPED if not (alone or code) and peers.first_true(stopper.requested) else code


def train_as_guest(config: ConfigDict, folder: str) -> None:
    """Trains inside a host process, such as a notebook: installs no signal handlers and never ends the process.

    There is no watchdog. After an exception, KeyboardInterrupt included, the same call resumes from the last save.

    Raises:
      UserError: the user made a mistake, or the workdir is in use.
      GuardError: a guard stopped the run, or the workdir was lost.
    """
    startup_timer.begin()
    _train(config, folder, NoSignals(), 0, alone=True, ends_process=False)


def _train(config: ConfigDict, folder: str, stopper: Stopper, stall_seconds: float, alone: bool,
           ends_process: bool = True) -> int:
    run = open_run(config, folder)
    if why := peers.broadcast(_why_finished(run)):
        print_once(f"{run.workdir} is finished: {why}")
        return errors.FINISHED
    watchdog = Watchdog(stall_seconds, run.workdir)
    compiled, held = compiled_programs(config, run.workdir), workdir_lock.hold(run.workdir, ends_process)
    with held, jax.set_mesh(run.program.mesh), compiled, watchdog:
        try:
            return resume(run, stopper, watchdog, alone)
        finally:
            run.program.leave()


def _why_finished(run: Run) -> str:
    """Returns why a run is finished by its DONE file, and how to continue it; '' for an unfinished run."""
    finished, early = ending.finished(run.workdir), ending.early_end(run.workdir)
    at = f"step {finished} of {run.timeline.total}"
    if finished >= run.timeline.total:
        return f"{at}; a longer train.duration goes on"
    best, patience = run.config.checkpoint.best_metric.removeprefix("val/"), run.timeline.patience
    if early and patience and early.metric == f"val/{best}" and finished - early.best_step >= patience:
        return (f"{at}, early: {early}, train.patience={run.config.train.patience!r}; a longer train.patience, or '', "
                "goes on")
    return ""


def resume(run: Run, stopper: Stopper, watchdog: Watchdog, alone: bool = True) -> int:
    """Restores or initializes the state and trains; for `alone` see `train`. Returns the exit code."""
    config, folder = run.config, run.workdir
    evaluator = evaluation.check(run)
    checkpoints = Checkpoints(folder, config.checkpoint.keep_last, run.timeline.keep_every)
    watchdog.watch("reading the checkpoint")
    state = checkpoints.restore(run.program.state)
    watchdog.watch("")
    if state is None:
        if finished := peers.broadcast(ending.finished(folder)):
            raise UserError(f"{folder} is of a run that finished {finished} steps, and has no checkpoint to "
                            "continue from; restore its folder checkpoints, or use another --workdir")
        _check_room(run)
        with progress.doing("initializing the model"):
            ahead = functools.partial(evaluator.compile, run.program.state) if evaluation.is_due(run, 0) else None
            state = initial_state(run, meanwhile=functools.partial(run.program.compile_ahead, ahead))
        print_once(f"{parameter_table.summary(state.params, run.program.method)}; each by name in "
                   f"{folder / parameter_table.FILE}")
    elif int(state.step) > run.timeline.total:
        raise UserError(f"{folder} is at step {int(state.step)}, past train.duration={config.train.duration!r} "
                        f"({run.timeline.total} steps)")
    else:
        run.program.method.check_extras(state.extras)
        _check_room(run)
        run.program.compile_ahead()
        logger.info("resumed at step %d", state.step)
    startup_timer.done("state")
    # Only after all checks of the user's settings.
    workdir.record(folder, config, run.inputs, evaluator.names_applying)
    step, first = int(state.step), jax.process_index() == 0
    recorder = MetricWriter(folder, step, metric_sinks.names(config.log), first, since=step)
    recorder.write_config(config)
    try:
        periodic = PeriodicEvaluation(run, evaluator, recorder)
        periodic.write_file(parameter_table.FILE, f"{parameter_table.table(state.params, run.program.method)}\n")
        with progress.doing("training", run.timeline.total, step, "step", logged=False) as line:
            code = loop(run, state, checkpoints, periodic, stopper, watchdog, line)
        if code == errors.FINISHED and alone:
            best = periodic.best.step if periodic.best else 0
            next_steps.conclude(run, recorder, periodic.part, peers.broadcast(ending.finished(folder)), best)
    except BaseException:
        if not peers.peers():  # in a group, the other processes may not join to wait for the last save
            checkpoints.close()
        raise
    finally:
        recorder.close()
    checkpoints.close()
    return code


def dry_run(config: ConfigDict, folder: str) -> int:
    """Compiles the train step and prints devices, mesh and rows per process; writes nothing. Returns the exit code."""
    run = open_run(config, folder)
    _check_room(run)
    if config.init_from and not peers.broadcast(step_dirs.committed(run.workdir / "checkpoints")):
        warm_start.load(config, run.program.state.params, run.inputs.classes)  # checks init_from as the run would
    mesh, rows = run.program.mesh, sharding.local_rows(run.program.mesh, config.batch_size)
    with jax.set_mesh(mesh):
        run.program.compile()
    startup_timer.done("compile")
    kinds = sorted({device.device_kind for device in jax.devices()})
    processes = jax.process_count()
    print_once(f"{pluralize(jax.device_count(), 'device')} ({', '.join(kinds)}) of {processes} "
               f"process{'es' if processes > 1 else ''}")
    print_once(f"mesh: {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}")
    shares = peers.gather(f"{len(rows)} rows of {config.batch_size}, {jax.local_device_count()} devices")
    for number, share in enumerate(shares):
        print_once(f"process {number}: {share}")
    print_once(f"{run.timeline.total} steps; compiled after {startup_timer.summary()}")
    return errors.FINISHED


def _check_room(run: Run) -> None:
    """Raises UserError on every process if the disk has no room for the run's checkpoints, at least one."""
    config, timeline, why = run.config.checkpoint, run.timeline, ""
    if jax.process_index() == 0:
        there = step_dirs.committed(run.workdir / "checkpoints")
        saves = timeline.total // (timeline.save_every or timeline.total) + 1
        kept = timeline.total // timeline.keep_every if timeline.keep_every else 0
        best = 2 * bool(config.best_metric)
        try:
            more = min(config.keep_last + kept + 1, saves) + best - len(there)
            disk.check_room(run.workdir, run.program.state, max(1, more))
        except UserError as error:
            why = str(error)
    if why := peers.broadcast(why):
        raise UserError(why)


class Profile:
    """Writes a profiler trace of the steps `log.profile_steps` = 'first:last' to <workdir>/profile."""

    def __init__(self, run: Run):
        self.first, last = profile_steps(run.config)
        self.last, self.running = min(last, run.timeline.total), False
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


def loop(run: Run, state: TrainState, checkpoints: Checkpoints, periodic: PeriodicEvaluation, stopper: Stopper,
         watchdog: Watchdog, line: progress.Line) -> int:
    """Trains from the state's step to the end; `line` shows the progress. Returns the exit code."""
    start, total = int(state.step), run.timeline.total
    log, profile = StepLogger(run, periodic.recorder, line), Profile(run)
    save_every = run.timeline.save_every
    if periodic.is_overdue(start):
        watchdog.watch(f"the evaluation at step {start}")
        periodic.evaluate(state, start)
        watchdog.watch("")
        startup_timer.done("evaluation")
    if periodic.ends_early(start):  # it stopped before DONE was written, or has a shorter patience now
        return finish(run, checkpoints, state, start, periodic.ends_early(start))
    run.program.compile()
    startup_timer.done("compile")
    batches = device_batches(run, start)
    log.speed.start()
    for done in range(start + 1, total + 1):
        watchdog.watch(f"the input of step {done}")
        batch = log.speed.waiting(lambda: next(batches))
        watchdog.watch(f"step {done}")
        profile.before(done)
        state, metrics = run.program.step(state, batch)
        profile.after(done, metrics)
        stopper.mark_unsaved()
        workdir_lock.wait_until_verified()
        if done == start + 1:
            _show_first_step(run, periodic, done, batch, metrics)
            log.speed.start()
        stop = stopper.should_stop(done)
        look = periodic.is_due(done)
        # Also before an evaluation, so that a signal can end the evaluation at once.
        save = look or done == total or (save_every > 0 and done % save_every == 0)
        try:
            log.record(done, metrics, batch["id"])
            if save or stop:
                log.flush()
        except GuardError:
            _keep_config(run, periodic)
            checkpoints.save(done, state)
            checkpoints.wait()
            raise
        if save or stop:
            _keep_config(run, periodic)
            watchdog.watch(f"the save of step {done}")
            checkpoints.save(done, state)
        if stop and done < total:
            return finish(run, checkpoints, state, done)
        if look:
            checkpoints.wait()
            if not checkpoints.failed:
                stopper.mark_saved()
            watchdog.watch(f"the evaluation at step {done}")
            periodic.evaluate(state, done)
            if early := periodic.ends_early(done):
                return finish(run, checkpoints, state, done, early)
            log.speed.start()
    return finish(run, checkpoints, state, total)


def _show_first_step(run: Run, periodic: PeriodicEvaluation, done: int, batch: Batch, metrics: Metrics) -> None:
    """Logs the time to the first step since this start; draws the batch if it is the first one of the run."""
    jax.block_until_ready(metrics)
    startup_timer.done("first step")
    logger.info("time to first step %s", startup_timer.summary())
    if done == 1 and (drawn := first_batch.figure(run, batch)) is not None:
        periodic.recorder.write_image(0, "inputs", drawn)


def _keep_config(run: Run, periodic: PeriodicEvaluation) -> None:
    if jax.process_index() == 0:
        workdir.keep(run.workdir, run.config, run.inputs, periodic.evaluator.names_applying)


def finish(run: Run, checkpoints: Checkpoints, state: TrainState, step: int,
           early: ending.EarlyEnd | None = None) -> int:
    """Waits for the last save, retries it once if it failed, and prints how the run ended. Returns the exit code.

    Raises:
      UserError: the state could not be saved, or DONE cannot be written.
    """
    checkpoints.wait()
    if checkpoints.failed:  # the cause may have been temporary, and no other save follows
        checkpoints.save(step, state)
        checkpoints.wait()
    if checkpoints.failed:
        raise UserError(f"the state of step {step} could not be saved: {checkpoints.failed}; correct this and run the "
                        f"same command: it goes on from step {checkpoints.latest() or 0}")
    if step < run.timeline.total and not early:
        print_once(f"stopped at step {step} of {run.timeline.total}, state saved; the same command goes on")
        return errors.STOPPED
    workdir_lock.wait_until_verified()
    if jax.process_index() == 0:
        if why := workdir_lock.why_unwritable():
            raise UserError(f"the end of the run could not be recorded: {why}")
        ending.mark(run.workdir, step, early)
    why = f" of {run.timeline.total}, early: {early}, train.patience={run.config.train.patience!r}" if early else ""
    print_once(f"finished {step} steps{why}; {run.workdir}")
    return errors.FINISHED


def evaluate(folder: str, config: ConfigDict | None = None) -> int:
    """Evaluates the newest checkpoint of a workdir on its evaluation split. Returns the exit code.

    Args:
      folder: the workdir.
      config: the stored config, except for fields that a resumed run may change; None: the stored config.

    Raises:
      UserError: the config does not match, there is no evaluation split, or there is no checkpoint.
    """
    path, given = paths.locate_checkpoints(folder, "--workdir"), config is not None
    if config is None:
        config = config_for_inspection(path)
    else:
        config = workdir.continued(path, config)
        workdir.compare(workdir.read_config(path), config)
    for text in missing():  # only a warning: the checkpoint can be evaluated again
        logger.warning("not measured: the evaluation %s", text)
    run = prepare(config, path)
    log_changes((workdir.changes(path, config, run.inputs) if given else []) + data_changes(run))
    if not run.config.data.eval_split or not run.config.eval.test:
        raise UserError("data.eval_split is '', or eval.test is False: there is nothing to evaluate on")
    checkpoints = Checkpoints(path, run.config.checkpoint.keep_last)
    state = checkpoints.restore(run.program.state)
    if state is None:
        raise UserError(f"{path} has no checkpoint yet")
    run.program.method.check_extras(state.extras)
    # Later lines are kept: they can belong to a run in progress.
    recorder = MetricWriter(path, math.inf, metric_sinks.names(run.config.log), jax.process_index() == 0,
                            since=int(state.step))
    with jax.set_mesh(run.program.mesh):
        evaluator, began = Evaluator(run.program.method, run.inputs, run.program.mesh), time.monotonic()
        periodic = PeriodicEvaluation(run, evaluator, recorder)
        periodic.write(state, int(state.step), periodic.final_metrics(state, {}), began)
    recorder.close()
    checkpoints.close()
    return errors.FINISHED
