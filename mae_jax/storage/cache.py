"""A cache of files in the user's folder, for results that are computed once from unchanged data."""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from mae_jax.errors import UserError
from mae_jax.storage.npz import opened
from mae_jax.storage.paths import normalized


def folder() -> Path:
    """Returns the folder of the cache, which may not exist: $MAE_JAX_CACHE, or mae_jax in the user's cache folder."""
    if named := os.environ.get("MAE_JAX_CACHE", ""):
        return Path(normalized(named, "MAE_JAX_CACHE"))
    return Path(normalized(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME")) / "mae_jax"


def arrays(key: Any, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns arrays from the cache, or makes and stores them; a cache that cannot be read or written is ignored.

    Args:
      key: its repr must identify the inputs and the computation of the arrays.
      make: returns the arrays by name; they must not hold Python objects.
    """
    if (there := found(key)) is not None:
        return there
    made = make()
    keep(key, made)
    return made


def found(key: Any) -> dict[str, np.ndarray] | None:
    """Returns the arrays that `keep` stored under a key; None if there are none, or they cannot be read."""
    file = _place(key, ".npz")
    if file.is_file():
        with contextlib.suppress(UserError), opened(epath.Path(file)) as there:
            return {name: there[name] for name in there.files}
    return None


def keep(key: Any, arrays: dict[str, np.ndarray]) -> None:
    """Stores arrays without Python objects under a key and replaces former ones; does nothing if the cache fails."""
    file = _place(key, ".npz")
    partial = file.with_name(f"{file.name}.{secrets.token_hex(8)}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as opened_file:
            np.savez(opened_file, allow_pickle=False, **arrays)
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)


def file(key: Any, ending: str, size: int, write: Callable[[Path], None]) -> Path:
    """Returns a file of the cache, and makes it if it does not exist.

    Args:
      key: as in `arrays`.
      ending: of the file's name.
      size: approximate size of the file in bytes.
      write: writes the file to a path.

    Raises:
      UserError: the disk does not have enough space, or the file cannot be written.
    """
    place = _place(key, ending)
    if place.is_file():
        return place
    partial = place.with_name(f"{place.name}.{secrets.token_hex(8)}.partial")
    how = "MAE_JAX_CACHE names another folder for such copies"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place.parent).free
        if free < size:
            raise UserError(f"{place.parent} has {free / 1e9:.1f} GB left, and a copy for random access takes "
                            f"{size / 1e9:.1f} GB; {how}")
        write(partial)
        partial.replace(place)
    except OSError as error:
        raise UserError(f"cannot write {place.parent}: {error.strerror or error}; {how}") from None
    finally:
        partial.unlink(missing_ok=True)
    return place


def forget(key: Any, ending: str) -> None:
    """Removes a file that `file` made, such as a damaged one."""
    _place(key, ending).unlink(missing_ok=True)


def _place(key: Any, ending: str) -> Path:
    return folder() / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}{ending}"
