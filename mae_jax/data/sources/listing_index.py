"""The listing of a large folder, kept until one of its folders changes: then it is made anew.

Adding, removing or renaming a file changes the time of the folder that it lies in, which the kernel sets; looking at
the folders takes as long as there are folders, not files. What links lead to changes elsewhere: a folder with links in
it is listed at each start.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mae_jax.data.sources.names import Names
from mae_jax.storage import cache

VERSION = 1  # of what is kept
FROM = 50_000  # files; fewer are listed as fast
SETTLED = 2_000_000_000  # nanoseconds after its last change in which a folder may change within the clock's precision
Arrays = dict[str, np.ndarray]


class Folders:
    """The folders that a listing has gone through, and when each changed before it was read."""

    def __init__(self) -> None:
        self.links = False  # whether one leads elsewhere
        self._names, self._times, self._began = list[str](), list[int](), time.time_ns()

    def add(self, base: str, name: str) -> None:
        """Takes note of a folder that is about to be read."""
        self._names.append(name)
        self._times.append(_changed(os.path.join(base, name)))

    def arrays(self) -> Arrays | None:
        """Returns what is kept of the folders, None where it would not tell a change."""
        if self.links or max(self._times, default=0) > self._began - SETTLED:
            return None
        names = Names.of(self._names)
        return {"folder_letters": names.letters, "folder_ends": names.ends, "times": np.array(self._times, np.int64)}


def kept(base: str, how: Any, make: Callable[[Folders], Arrays]) -> Arrays:
    """Returns the listing of a folder on a disk, as `make` gives it.

    Args:
      base: the folder.
      how: it is listed; another value, another listing.
      make: lists the folder, and tells `Folders` of each that it reads; it has `picture_ends` and `other_ends`.
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
    """Returns when a folder changed, in nanoseconds; -1 where it is not there."""
    try:
        stat = os.stat(folder)
    except OSError:
        return -1
    return max(stat.st_mtime_ns, stat.st_ctime_ns)
