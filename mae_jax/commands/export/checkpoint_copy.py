"""Copies a checkpoint to another folder, local or gs://, for `init_from`, `load_params`, --mode=eval and training.

The copy is a workdir with config.json and one complete step, so that training can resume from it. The mark of a
complete checkpoint is written last. Then the copy is read back and compared with the checksums of the source.
"""

import logging
import math
from collections.abc import Iterator

from etils import epath

from mae_jax.errors import UserError
from mae_jax.storage import paths, step_dirs
from mae_jax.storage.checkpoint import read_back
from mae_jax.storage.checksum import Damaged, Record
from mae_jax.training import workdir

READ_TRIES = 2  # of reading from a bucket: data may be damaged in transit only

logger = logging.getLogger(__name__)


def copy(source: epath.Path, to: epath.Path) -> str:
    """Copies the newest good step; after an interruption, the same command copies it anew.

    Args:
      source: a workdir, or one step's folder in it.
      to: the folder, which may hold other steps of the same run.

    Returns:
      One line about the copy.

    Raises:
      UserError: there is no good checkpoint, `to` belongs to another run, or the copy came out damaged.
    """
    source, to = step_dirs.absolute(source), step_dirs.absolute(to)
    origin = workdir.of_checkpoint(source)
    if to == origin or origin in to.parents:
        raise UserError(f"--to={to} is the workdir itself, or in it; choose another folder")
    _check_same_run(origin, to)
    folder, record = _newest_good(source)
    target = to / "checkpoints" / folder.name
    if step_dirs.complete(target) and _same(target, record):
        return f"{target}: there already, verified: {_size(record)}"
    paths.make_folder(to)
    paths.replace_text(to / "config.json", paths.read_text(origin / "config.json"))
    with paths.naming(target):
        _copy(folder, target)
    if not _same(target, record):
        _remove(target)
        raise UserError(f"{target} was damaged while it was written, and removed; run the same command again")
    return f"{target}: {_size(record)}, verified"


def _size(record: Record) -> str:
    return f"{len(record)} arrays, {sum(math.prod(shape) for shape, *_ in record.values()):,} values"


def _check_same_run(origin: epath.Path, to: epath.Path) -> None:
    config = workdir.read_config(origin)
    try:
        workdir.changes(to, config, origin=origin)
    except UserError as error:
        why, _, _ = str(error).partition(". Use another --workdir")  # a flag that `export` has not
        raise UserError(f"--to={to} holds a checkpoint of another run; choose another folder ({why})") from None


def _newest_good(source: epath.Path) -> tuple[epath.Path, Record]:
    for folder in step_dirs.offered(source):
        if record := _verified(folder):
            return folder, record
    raise UserError(f"no checkpoint in {source} could be read; expected a workdir with checkpoints/, or a step folder "
                    "in it; see the warnings above")


def _verified(folder: epath.Path) -> Record | None:
    """Returns the checksums of a step's folder; None if it is damaged."""
    for _ in range(READ_TRIES if str(folder).startswith("gs://") else 1):
        try:
            return read_back(folder)
        except Damaged as damage:
            logger.warning("checkpoint %s: %s", folder, damage)
    return None


def _same(folder: epath.Path, record: Record) -> bool:
    """Returns whether a step's folder is a good copy; raises UserError if it is another good checkpoint."""
    found = _verified(folder)
    if found and found != record:
        raise UserError(f"{folder} is another checkpoint; choose another folder for --to")
    return found is not None


def _copy(folder: epath.Path, target: epath.Path) -> None:
    _remove(target)
    local = not str(target).startswith("gs://")
    # A folder of this name counts as the remains of an interrupted save.
    place = target.with_name(f"{target.name}.orbax-checkpoint-tmp-copy") if local else target
    _remove(place)
    for name in list(_files(folder)):
        if name != step_dirs.MARK:
            paths.make_folder((place / name).parent)
            content = paths.read_bytes(folder / name)
            if content is None:
                raise UserError(f"{folder / name} no longer exists; perhaps a run deletes its old checkpoints")
            paths.replace_bytes(place / name, content)
    paths.replace_text(place / step_dirs.MARK, "copied\n")
    if local:
        place.rename(target)


def _files(folder: epath.Path, inside: str = "") -> Iterator[str]:
    """Yields the relative names of all files under a folder; raises UserError for a name that leads out of it.

    In a bucket a name may contain '..'. The empty object that some tools create for the folder itself is skipped.
    """
    for path in sorted(folder.iterdir()):
        if path.name == folder.name and not path.exists():
            continue
        if path.name in (".", ".."):
            raise UserError(f"{path}: no checkpoint has an object of such a name; nothing was copied")
        if path.is_dir():
            yield from _files(path, f"{inside}{path.name}/")
        else:
            yield f"{inside}{path.name}"


def _remove(folder: epath.Path) -> None:
    """Removes a step's folder if it exists, the mark of a complete checkpoint first."""
    if folder.exists():
        (folder / step_dirs.MARK).unlink(missing_ok=True)
        folder.rmtree()
