"""What was made once from data that stay as they are, kept for the next start, in a folder of the user's."""

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
    """Returns $MAE_JAX_CACHE, or mae_jax in the user's folder for caches; it need not be there."""
    if named := os.environ.get("MAE_JAX_CACHE", ""):
        return Path(normalized(named, "MAE_JAX_CACHE"))
    return Path(normalized(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME")) / "mae_jax"


def arrays(key: Any, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns arrays, none of Python objects, from the cache, or makes and keeps them; a cache that fails is none.

    Args:
      key: whose repr says of what the arrays are made, and how: another one has other arrays.
      make: makes them.
    """
    if (there := found(key)) is not None:
        return there
    made = make()
    keep(key, made)
    return made


def found(key: Any) -> dict[str, np.ndarray] | None:
    """Returns arrays that `keep` kept under a key; None where there are none, or they cannot be read."""
    file = _place(key, ".npz")
    if file.is_file():
        with contextlib.suppress(UserError), opened(epath.Path(file)) as there:
            return {name: there[name] for name in there.files}
    return None


def keep(key: Any, arrays: dict[str, np.ndarray]) -> None:
    """Keeps arrays, none of Python objects, under a key, in place of others; where the cache fails, it does not."""
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
    """Returns a file of the cache, which is made where it is not there yet.

    Args:
      key: as of `arrays`.
      ending: of the file's name.
      size: bytes that it takes, about.
      write: writes it to a path.

    Raises:
      UserError: the disk has no room for it, or it cannot be written.
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
    """Removes a file that `file` made, which is damaged."""
    _place(key, ending).unlink(missing_ok=True)


def _place(key: Any, ending: str) -> Path:
    return folder() / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}{ending}"
