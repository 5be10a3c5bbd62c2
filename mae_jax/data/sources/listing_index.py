"""Cache of the listing of a large folder, valid until one of its sub-folders changes.

Adding, removing or renaming a file changes the time of its folder, which the kernel sets; checking the times takes time
per folder, not per file. The targets of links change elsewhere, so a folder with links is listed at each start.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mae_jax.data.sources.names import Names
from mae_jax.storage import cache

VERSION = 1  # of the cached arrays
FROM = 50_000  # files; fewer are listed as fast without a cache
SETTLED = 2_000_000_000  # nanoseconds; a later change within the clock's precision could leave the time as it is
Arrays = dict[str, np.ndarray]


class Folders:
    """The folders that a listing has visited, and the time of each one's last change before it was read."""

    def __init__(self) -> None:
        self.links = False  # whether there are symbolic links
        self._names, self._times, self._began = list[str](), list[int](), time.time_ns()

    def add(self, base: str, name: str) -> None:
        """Records a folder that is about to be read."""
        self._names.append(name)
        self._times.append(_changed(os.path.join(base, name)))

    def arrays(self) -> Arrays | None:
        """Returns the arrays to cache for the folders; None if they could not reveal a change."""
        if self.links or max(self._times, default=0) > self._began - SETTLED:
            return None
        names = Names.of(self._names)
        return {"folder_letters": names.letters, "folder_ends": names.ends, "times": np.array(self._times, np.int64)}


def kept(base: str, how: Any, make: Callable[[Folders], Arrays]) -> Arrays:
    """Returns the listing of a local folder, from the cache or by `make`.

    Args:
      base: the folder.
      how: options of the listing, part of the cache key.
      make: lists the folder, and adds each folder it reads to `Folders`; its result has `picture_ends` and
        `other_ends`.
    """
    key = ("folder", VERSION, os.path.realpath(base), how)
    found = cache.found(key)
    if found is not None and _unchanged(base, found):
        return found
    folders = Folders()
    made = make(folders)
    times = folders.arrays() if len(made["picture_ends"]) + len(made["other_ends"]) >= FROM else None
    if times is not None:
        cache.keep(key, {**made, **times})
    return made


def _unchanged(base: str, found: Arrays) -> bool:
    names = Names(found["folder_letters"], found["folder_ends"])
    return all(_changed(os.path.join(base, name)) == then for name, then in zip(names, found["times"], strict=True))


def _changed(folder: str) -> int:
    """Returns the time of a folder's last change, in nanoseconds; -1 if it does not exist."""
    try:
        stat = os.stat(folder)
    except OSError:
        return -1
    return max(stat.st_mtime_ns, stat.st_ctime_ns)
