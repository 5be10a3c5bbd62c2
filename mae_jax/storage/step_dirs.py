"""The step folders of a workdir: complete checkpoints, and leftovers of interrupted saves."""

import os
import re
import shutil

from etils import epath

from mae_jax.storage.paths import for_orbax

MARK = "commit_success.txt"  # the last file that orbax writes
TEMPORARY = ".orbax-checkpoint-tmp"  # part of the name of a local folder during a save


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the gs:// or absolute path that orbax requires; raises UserError as `for_orbax` does."""
    path = for_orbax(os.fspath(path))
    return epath.Path(path if path.startswith("gs://") else os.path.abspath(path))


def newest(path: epath.PathLike) -> epath.Path:
    """Returns the step folder that `load_params` would read; the path itself if there is none."""
    path = epath.Path(path)
    return next(iter(offered(path)), path) if path.is_dir() else path


def offered(path: epath.Path) -> list[epath.Path]:
    """Returns the step folders of a workdir, of its checkpoints folder or of a step folder, newest first."""
    if (path / "state").exists():
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").exists() else path
    return [folder / str(step) for step in reversed(committed(folder))]


def committed(folder: epath.Path) -> list[int]:
    """Returns the steps of complete checkpoints, ascending."""
    if os.fspath(folder).startswith("gs://"):
        return _marked(folder)
    if not folder.exists():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if _of_step(path) and complete(path))


def _marked(folder: epath.Path) -> list[int]:
    """Returns the complete steps in a bucket, ascending, by a single listing."""
    from mae_jax.storage import gcs

    found = (epath.Path(name) for name in gcs.names(str(folder), f"*/{MARK}"))
    return sorted(int(path.parent.name) for path in found if len(path.parts) == 2 and _of_step(path.parent))


def complete(path: epath.Path) -> bool:
    """Returns whether a step folder holds a complete checkpoint."""
    # A local save is renamed when complete; a save in a bucket is written in place and marked.
    return (path / MARK).exists() if os.fspath(path).startswith("gs://") else path.is_dir()


def leftovers(folder: epath.Path) -> list[epath.Path]:
    """Returns the folders left over from interrupted saves; never a file."""
    if os.fspath(folder).startswith("gs://"):
        from mae_jax.storage import gcs

        whole = set(map(str, _marked(folder)))
        inside = (folder / name for name in gcs.names(str(folder)) if name.endswith("/"))
        return [path for path in inside if path.name not in whole and (TEMPORARY in path.name or _of_step(path))]
    return [path for path in folder.iterdir() if path.is_dir() and (
        TEMPORARY in path.name or (_of_step(path) and not complete(path)))]


def move(folder: epath.Path, target: epath.Path) -> None:
    """Moves a folder, also to another disk, since `checkpoints` may be a link."""
    if os.fspath(folder).startswith("gs://"):
        folder.rename(target)
    else:
        try:
            shutil.move(folder, target)
        except OSError:
            shutil.rmtree(target, ignore_errors=True)  # an incomplete copy
            raise


def _of_step(path: epath.Path) -> bool:
    return re.fullmatch(r"0|[1-9][0-9]{0,17}", path.name, re.ASCII) is not None


def unused(folder: epath.Path, name: str) -> epath.Path:
    """Returns an unused path in the folder: `name`, or `name` with a number appended."""
    path, count = folder / name, 1
    while path.exists():
        path, count = folder / f"{name}_{count}", count + 1
    return path
