"""A checkpoint copied to another folder, local or gs://, which `init_from`, `load_params` and --mode=eval read there.

The copy is a workdir of its own: config.json and one step, all of it, so that training can go on there as well. What
says that it is whole is written last; then it is read back and its arrays are compared with the source's checksums.
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

READ_TRIES = 2  # of reading from a bucket: what arrives damaged may be so on its way only

logger = logging.getLogger(__name__)


def copy(source: epath.Path, to: epath.Path) -> str:
    """Copies the newest good step; the same command after an interruption does it again.

    Args:
      source: a workdir, or one step's folder in it.
      to: the folder, which may hold other steps of the same run.

    Returns:
      What was done, in one line.

    Raises:
      UserError: nothing good is there, or `to` belongs to another run.
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
    _copy(folder, target)
    if not _same(target, record):
        _remove(target)
        raise UserError(f"{target} came out damaged and was removed again; run the same command once more")
    return f"{target}: {_size(record)}, verified"


def _size(record: Record) -> str:
    return f"{len(record)} arrays, {sum(math.prod(shape) for shape, *_ in record.values()):,} values"


def _check_same_run(origin: epath.Path, to: epath.Path) -> None:
    config = workdir.read_config(origin)
    try:
        workdir.changes(to, config, origin=origin)
    except UserError as error:
        raise UserError(f"--to={to} holds a checkpoint of another run; choose another folder ({error})") from None


def _newest_good(source: epath.Path) -> tuple[epath.Path, Record]:
    for folder in step_dirs.offered(source):
        if record := _verified(folder):
            return folder, record
    raise UserError(f"no checkpoint in {source} could be read; expected a workdir with checkpoints/, or a step folder "
                    "in it; see the warnings above")


def _verified(folder: epath.Path) -> Record | None:
    """Returns what a step's folder holds, None where it is damaged."""
    for _ in range(READ_TRIES if str(folder).startswith("gs://") else 1):
        try:
            return read_back(folder)
        except Damaged as damage:
            logger.warning("checkpoint %s: %s", folder, damage)
    return None


def _same(folder: epath.Path, record: Record) -> bool:
    """Says whether a step's folder is the good copy; raises UserError where it is another good checkpoint."""
    found = _verified(folder)
    if found and found != record:
        raise UserError(f"{folder} is another checkpoint; choose another folder for --to")
    return found is not None


def _copy(folder: epath.Path, target: epath.Path) -> None:
    _remove(target)
    local = not str(target).startswith("gs://")
    # A folder of this name is taken for what an interrupted save left.
    place = target.with_name(f"{target.name}.orbax-checkpoint-tmp-copy") if local else target
    _remove(place)
    for name in list(_files(folder)):
        if name != step_dirs.MARK:
            paths.make_folder((place / name).parent)
            content = paths.read_bytes(folder / name)
            if content is None:
                raise UserError(f"{folder / name} is no longer there; is a run deleting its old checkpoints?")
            paths.replace_bytes(place / name, content)
    paths.replace_text(place / step_dirs.MARK, "copied\n")
    if local:
        place.rename(target)


def _files(folder: epath.Path, inside: str = "") -> Iterator[str]:
    """Yields the names of all files under a folder; raises UserError for one that would lead out of it.

    In a bucket a name may have '..' in it; the empty object that some tools make for the folder itself is left out.
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
    """Removes a step's folder where there is one, first of all what says that it is whole."""
    if folder.exists():
        (folder / step_dirs.MARK).unlink(missing_ok=True)
        folder.rmtree()
