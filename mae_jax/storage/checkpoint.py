"""Checkpoints, which are saved asynchronously and verified array by array when read. The only module that uses orbax.

A checkpoint is a folder <workdir>/checkpoints/<step> with two items: `state`, the arrays by path
('params/encoder/block_00/attn/qkv/kernel'), and `checksums`, the shape, dtype and 64-bit checksum of each array: Orbax
detects a flipped bit in its metadata, but not in array data, and may restore wrong values from damaged metadata.
"""

import contextlib
import functools
import itertools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mae_jax.errors import UserError, root_cause
from mae_jax.param_tree import flatten, nest
from mae_jax.runtime import peers, progress, threads
from mae_jax.runtime.exit import wait_for_no_thread
from mae_jax.storage import step_dirs, weight_files, workdir_lock
from mae_jax.storage.attempt import attempt
from mae_jax.storage.checksum import Damaged, Record, check_same_model, damage, describe, seal, unseal, verify
from mae_jax.storage.paths import make_folder

logger = logging.getLogger(__name__)
PyTree = Any

SAVE_SECONDS = 600  # timeout of a save; TensorStore would retry a bucket for about 15 minutes
MEETINGS = 2  # barriers of all processes in a save: before and after process 0 commits it
PATIENCE = 15  # seconds that training waits for a save before it logs a warning


class Checkpoints:
    """The checkpoints of one run. Every process creates an instance and calls the same methods in the same order.

    Attributes:
      failed: why the last save failed; None if it succeeded. Training continues, and earlier checkpoints stay.
    """

    def __init__(self, workdir: epath.PathLike, keep_last: int, keep_every: int = 0) -> None:
        """Writes nothing before the first `save`, so that readers can open the workdir of a running run.

        Args:
          workdir: local or gs://.
          keep_last: number of newest checkpoints to keep.
          keep_every: checkpoints at multiples of this step are never deleted; 0: none.
        """
        self.failed: str | None = None
        self._root = step_dirs.absolute(workdir)
        self._folder = self._root / "checkpoints"
        self._keep_last, self._keep_every = keep_last, keep_every
        self._pending: int | None = None
        self._refused: list[int] = []
        self._there: list[int] = []  # committed steps without refused ones, at the last listing
        self._looked = False  # whether the bucket, which only this run writes, was listed since the last failed save
        self._meetings, self._told = 0, False  # barriers passed in the current save; whether another process failed
        self._checkpointer = ocp.AsyncCheckpointer(_handler(), async_options=ocp.options.AsyncOptions(
            timeout_secs=SAVE_SECONDS, barrier_sync_fn=lambda **_: self._meet()))

    def latest(self) -> int | None:
        """Returns the newest committed step that was not refused; None if there is none."""
        attempt("look for checkpoints", self._look)
        return max(peers.broadcast(self._there), default=None)

    def save(self, step: int, state: PyTree) -> None:
        """Starts to save `state`, any tree of arrays, and returns when its buffers may be donated.

        It first waits for the previous save. A step that exists already is not written again.
        """
        self.wait()
        arrays = flatten(state)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(nest(arrays)),
                                   checksums=ocp.args.JsonSave(seal(describe(arrays))))
        # Orbax's save waits for all processes, so no process may enter it if another one cannot.
        if not self._all_could(step, functools.partial(self._prepare, step)):
            return
        if peers.broadcast(step in self._there):
            return
        failed, self._meetings, self._told = None, 0, False
        try:
            self._checkpointer.save(self._folder / str(step), args=items)
        except Exception as error:
            failed = error
        self._pending, self._ending = step, threads.start(functools.partial(self._end, step, failed))
        if peers.first_true(bool(failed)):
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is committed or has failed, and old checkpoints are deleted."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        with progress.doing(f"writing the checkpoint of step {step:,}"):
            if not threads.ends(self._ending, PATIENCE):
                logger.warning("training waits for the checkpoint of step %d: its disk or bucket is slow", step)
        if self._all_could(step, self._ending.result):
            self.failed = None

    def restore(self, abstract: PyTree) -> PyTree | None:
        """Reads the newest checkpoint that passes verification.

        Args:
          abstract: tree of jax.ShapeDtypeStruct with shardings, on any mesh.

        Returns:
          The tree with every array as it was saved, bit for bit; None if there are no checkpoints.

        Raises:
          UserError: all checkpoints are damaged, or they belong to another model.
        """
        if not attempt("look for checkpoints", self._look, tries=2):  # a failure must not count as an empty folder
            raise UserError(f"cannot look for checkpoints in {self._folder}; see the warning above")
        steps, wanted = peers.broadcast(self._there), flatten(abstract)
        if workdir_lock.holds():
            attempt("look for interrupted saves", self._tell_leftovers)
        for step in reversed(steps):
            with progress.doing(f"reading the checkpoint of step {step:,}"):
                arrays = self._try(step, wanted)
            if arrays is not None:
                return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path in wanted])
            self._refused.append(step)
        if steps:
            raise UserError(f"no checkpoint in {self._folder} could be read (steps {', '.join(map(str, steps))}, see "
                            "the warnings above); move the folder away to start from the beginning")
        return None

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        self.wait()
        if self.failed:
            attempt("clean up", self._sweep)
        with contextlib.suppress(Exception):  # orbax raises the failure of a save again, which was reported already
            self._checkpointer.close()

    def _look(self) -> None:
        if jax.process_index() == 0:  # on a network file system, other processes may see other folders for a while
            self._there = [step for step in step_dirs.committed(self._folder) if step not in self._refused]

    def _tell_leftovers(self) -> None:
        for path in step_dirs.leftovers(self._folder) if self._folder.exists() else ():
            logger.warning("%s is left over from an interrupted save and is ignored", path)

    def _try(self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array] | None:
        """Returns the arrays of a step; None if they are damaged."""
        for then in _tries(self._folder):
            arrays = self._read(step, wanted, then)
            if arrays is not None:
                return arrays
        return None

    def _read(self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct], then: str) -> dict[str, jax.Array] | None:
        folder = self._folder / str(step)
        record = self._all_read(step, lambda: _read_record(self._checkpointer, folder), then)
        if record is None:
            return None
        check_same_model(folder, record, wanted)
        how = {path: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype, global_shape=leaf.shape)
               for path, leaf in wanted.items()}
        arrays = self._all_read(step, lambda: _read_arrays(self._checkpointer, folder, how), then)
        return arrays and self._all_read(step, lambda: _of_step(folder, verify(record, arrays)), then)

    def _all_read(self, step: int, read: Callable[[], Any], then: str) -> Any:
        """Returns `read()`, or None if it raises Damaged on any process."""
        result = None
        try:
            result = read()
        except Damaged as damage:
            logger.warning("checkpoint of step %d %s", step, then.format(damage))
        return None if peers.first_true(result is None) else result

    def _meet(self) -> None:
        """The barrier of all processes in a save; raises RuntimeError if one of them failed.

        At orbax's own barrier, the others would wait for a failed process until SAVE_SECONDS. This barrier has no
        timeout for busy processes, and needs none: the main threads wait for all processes before the next save too.
        """
        self._meetings += 1
        if peers.first_true(False, "save"):
            self._told = True
            raise RuntimeError("another process failed")

    def _end(self, step: int, failed: Exception | None) -> None:
        """Waits in the background for a save, unless it failed at once, and deletes old checkpoints."""
        try:
            if failed:
                raise failed
            self._checkpointer.wait_until_finished()
            # If one write fails, others may be cancelled, which orbax does not report as a failure.
            alone = jax.process_count() == 1
            written = (self._folder / str(step)).exists() if alone else self._meetings == MEETINGS
            if not written:
                raise OSError("writing was cancelled")
            if jax.process_index() == 0:
                self._check_readable(step)
        except Exception:
            if self._told:
                return  # the other process reports the reason
            if self._meetings < MEETINGS:
                peers.first_true(True, "save")
            raise
        if jax.process_index() == 0:
            attempt("delete old checkpoints", self._prune)

    def _check_readable(self, step: int) -> None:
        """Raises OSError if a committed checkpoint cannot be read; the next save then moves it away."""
        for _ in _tries(self._folder):
            if why := workdir_lock.why_unwritable():
                raise OSError(why)
            try:
                return _open_all(self._folder / str(step))
            except Damaged as error:
                damage = error
        self._refused.append(step)
        raise OSError(f"it was written, but cannot be read: {damage}")

    def _prepare(self, step: int) -> None:
        """Prepares a save: removes the leftovers of interrupted saves, and moves damaged checkpoints away."""
        if jax.process_index() == 0:
            if why := workdir_lock.why_unwritable():
                raise OSError(why)
            if self._looked:  # `_prune` has listed the folder in the background: 2,000 steps take a while to list
                return
            make_folder(self._folder)
            self._sweep()
            self._look()
            self._looked = str(self._folder).startswith("gs://")
            stray = [step] * (step not in self._there and (self._folder / str(step)).exists())
            for bad in {*self._refused, *stray}:
                attempt(f"move the refused checkpoint of step {bad}", functools.partial(self._move_aside, bad))
            self._refused = [bad for bad in self._refused if (self._folder / str(bad)).exists()]

    def _move_aside(self, step: int) -> None:
        folder = self._root / "refused"
        make_folder(folder)
        # This also makes the folder exist in a bucket, as a rename requires.
        (folder / "README.txt").write_text("Damaged checkpoints, kept for inspection; mae_jax does not read them.\n")
        target = step_dirs.unused(folder, str(step))
        step_dirs.move(self._folder / str(step), target)
        logger.warning("the refused checkpoint of step %d is now in %s", step, target)

    def _prune(self) -> None:
        self._look()
        for step in self._there[:-self._keep_last]:
            if not self._keep_every or step % self._keep_every:
                attempt(f"delete the old checkpoint of step {step}", (self._folder / str(step)).rmtree)

    def _all_could(self, step: int, action: Callable[[], Any]) -> bool:
        """Runs a part of saving a step; returns whether it succeeded on all processes, and logs a failure."""
        why = ""
        try:
            action()
        except Exception as error:  # whatever the file system, orbax or TensorStore raise
            why = root_cause(error)
        if cause := peers.first_true(why):
            self.failed = f"checkpoint of step {step} not saved: {cause}"
            logger.warning("%s; training goes on, earlier checkpoints stay", self.failed)
            self._looked = False
            wait_for_no_thread()  # orbax's threads may be busy with this save for many minutes
            attempt("clean up", self._sweep)
        return not cause

    def _sweep(self) -> None:
        if jax.process_index() == 0 and not workdir_lock.why_unwritable() and self._folder.exists():
            for path in step_dirs.leftovers(self._folder):
                attempt(f"remove {path}", path.rmtree, tries=5)


def load_params(path: epath.PathLike, ema: bool = False, extras: bool = False, step: bool = False) -> dict[str, Any]:
    """Reads and verifies parameters only.

    Args:
      path: a workdir (whose newest undamaged step is read), a step folder <workdir>/checkpoints/<step>, or a file of
        weights or a folder with one, as in `weight_files`.
      ema: read the averaged parameters instead, if the checkpoint has them.
      extras: read the extras too, under 'extras', if the checkpoint has them.
      step: return the number of the step too, under 'step', if `path` holds checkpoints.

    Returns:
      Nested dict of np.ndarray.

    Raises:
      UserError: there are no parameters at `path`, or they are damaged.
    """
    path = step_dirs.absolute(path)
    if file := weight_files.file_of(path):
        found, where = weight_files.load(file)
        if where:
            logger.info("%s: reading %s", file, where)
        return found
    folders = step_dirs.offered(path)
    if not folders:
        raise UserError(f"no checkpoint in {path}; expected a workdir with checkpoints/, a step folder in it, or "
                        "weights as *.safetensors, *.pth or a folder of transformers or timm")
    with ocp.Checkpointer(_handler()) as reader:
        for folder, then in itertools.product(folders, _tries(path)):
            try:
                return _load_step(reader, folder, ema, extras) | ({"step": int(folder.name)} if step else {})
            except Damaged as damage:
                logger.warning("checkpoint %s %s", folder, then.format(damage))
    raise UserError(f"no checkpoint in {path} could be read; see the warnings above")


def read_back(folder: epath.Path) -> Record:
    """Reads all arrays of a step folder; returns their record, or raises Damaged if one differs from what was saved."""
    with ocp.Checkpointer(_handler()) as reader:
        record = _read_record(reader, folder)
        arrays = _read_arrays(reader, folder, dict.fromkeys(record, ocp.RestoreArgs(restore_type=np.ndarray)))
        _of_step(folder, verify(record, arrays))
    return record


def _load_step(reader: ocp.Checkpointer, folder: epath.Path, ema: bool, extras: bool) -> dict[str, Any]:
    record = _read_record(reader, folder)
    averaged = [path for path in record if path.startswith("ema/")]
    paths = averaged if ema and averaged else [path for path in record if path.startswith("params/")]
    paths += [path for path in record if path == "step" or (extras and path.startswith("extras/"))]
    arrays = _read_arrays(reader, folder, {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths})
    _of_step(folder, verify({path: record[path] for path in paths}, arrays)).pop("step", None)
    return nest({re.sub("^(params|ema)/", "", path): array for path, array in arrays.items()})


def _tries(folder: epath.Path) -> list[str]:
    """Returns a message per try to read a step; two in a bucket, where the damage may be one of the transfer."""
    again = ["read damaged: {}; reading it again"] if str(folder).startswith("gs://") else []
    return [*again, "refused: {}; trying the one before"]


def _handler() -> ocp.CompositeCheckpointHandler:
    _quiet()
    return ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler(), checksums=ocp.JsonCheckpointHandler())


@functools.cache
def _quiet() -> None:
    """Silences orbax, whose failures this module reports in one line each.

    When an array cannot be read, orbax abandons the reads of the others, and Python prints a traceback for each.
    """
    inside = f"{os.sep}orbax{os.sep}"
    logging.getLogger("absl").addFilter(lambda record: inside not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    hook = sys.unraisablehook

    def unless_abandoned(event: Any) -> None:
        code = getattr(event.object, "cr_code", None)
        if str(event.exc_value) != "Event loop is closed" and not (code and inside in code.co_filename):
            hook(event)

    sys.unraisablehook = unless_abandoned


def _read_record(reader: ocp.Checkpointer, folder: epath.Path) -> Record:
    try:
        record = unseal(reader.restore(folder, args=ocp.args.Composite(checksums=ocp.args.JsonRestore())).checksums)
        nest(record)  # raises for names that do not form a tree
        return record
    except Exception as error:
        raise damage(folder / "checksums", error) from error


def _read_arrays(reader: ocp.Checkpointer, folder: epath.Path, how: Mapping[str, ocp.RestoreArgs]) -> dict[str, Any]:
    """Returns the arrays at the paths of `how`; raises Damaged if one cannot be read."""
    item = ocp.args.PyTreeRestore(nest(dict.fromkeys(how, 0)), restore_args=nest(how), partial_restore=True)
    try:
        arrays = flatten(reader.restore(folder, args=ocp.args.Composite(state=item)).state)
    except Exception as error:  # orbax and TensorStore raise anything from KeyError to XlaRuntimeError on damage
        raise damage(folder / "state", error) from error
    # An array with a damaged name comes back as the placeholder.
    return {path: array for path, array in arrays.items() if isinstance(array, jax.Array | np.ndarray)}


def _open_all(folder: epath.Path) -> None:
    """Reads the manifest, the checksums and the metadata of the arrays, but no array; raises Damaged."""
    # Orbax's handlers without a Checkpointer, which would wait for all processes.
    try:
        record = unseal(ocp.JsonCheckpointHandler().restore(folder / "checksums"))
        found = flatten(ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree)
    except Exception as error:
        raise Damaged(root_cause(error)) from error
    there = {path: [list(leaf.shape), str(np.dtype(leaf.dtype))] for path, leaf in found.items()}
    if there != {path: about[:2] for path, about in record.items()}:
        raise Damaged(f"{folder / 'state'}: it differs from what was saved")


def _of_step(folder: epath.Path, arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays; raises Damaged if they belong to another step than the folder's."""
    if "step" in arrays and folder.name.isdecimal() and int(arrays["step"]) != int(folder.name):
        raise Damaged(f"{folder}: it holds step {int(arrays['step'])}")
    return arrays
