"""Which folders of a workdir are whole checkpoints, and which are not."""

import os
import re
import shutil

from etils import epath

MARK = "commit_success.txt"  # orbax writes it last


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the path as orbax wants it; gs:// paths are absolute."""
    return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def newest(path: epath.PathLike) -> epath.Path:
    """Returns the step folder that `load_params` would read from; the path itself where there is none."""
    path = epath.Path(path)
    return next(iter(offered(path)), path) if path.is_dir() else path


def offered(path: epath.Path) -> list[epath.Path]:
    """Returns the steps that a workdir, its checkpoints folder or a step folder offers, newest first."""
    if (path / "state").exists():
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").exists() else path
    return [folder / str(step) for step in reversed(committed(folder))]


def committed(folder: epath.Path) -> list[int]:
    """Returns the steps of complete checkpoints, ascending."""
    if not folder.exists():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if _of_step(path) and complete(path))


def complete(path: epath.Path) -> bool:
    """Says whether a step's folder holds all of its checkpoint."""
    # A local save is renamed when complete; on a bucket it is written in place and marked.
    return (path / MARK).exists() if os.fspath(path).startswith("gs://") else path.is_dir()


def leftovers(folder: epath.Path) -> list[epath.Path]:
    """Returns the folders that interrupted saves left; a file is never one."""
    return [path for path in folder.iterdir() if path.is_dir() and (
        ".orbax-checkpoint-tmp" in path.name or (_of_step(path) and not complete(path)))]


def move(folder: epath.Path, target: epath.Path) -> None:
    """Moves a folder; on a disk also to another one, as where `checkpoints` is a link."""
    if os.fspath(folder).startswith("gs://"):
        folder.rename(target)
    else:
        try:
            shutil.move(folder, target)
        except OSError:
            shutil.rmtree(target, ignore_errors=True)  # part of a copy
            raise


def _of_step(path: epath.Path) -> bool:
    return re.fullmatch(r"0|[1-9][0-9]{0,17}", path.name, re.ASCII) is not None


def unused(folder: epath.Path, name: str) -> epath.Path:
    """Returns a path in the folder, called `name` or with a number after it, that nothing is at."""
    path, count = folder / name, 1
    while path.exists():
        path, count = folder / f"{name}_{count}", count + 1
    return path
