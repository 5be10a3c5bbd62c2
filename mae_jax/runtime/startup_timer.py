"""Timer of the phases before the first step, one per process, by a monotonic clock."""

import itertools
import time

_marks = [("", time.monotonic())]  # starts here, since a command imports this module first
_begun = False


def begin() -> None:
    """Starts the timer, for a process that trains several times; the first run's time starts at the import instead."""
    global _begun
    if _begun:
        _marks[:] = [("", time.monotonic())]
    _begun = True


def done(name: str) -> None:
    """Ends the current phase, names it, and starts the next one."""
    _marks.append((name, time.monotonic()))


def summary() -> str:
    """Returns the total and the phases, '12.3 s: imports 1.2, data 0.8, ...', and resets the timer."""
    parts = ", ".join(f"{name} {end - begin:.1f}" for (_, begin), (name, end) in itertools.pairwise(_marks))
    total = _marks[-1][1] - _marks[0][1]
    del _marks[:-1]
    return f"{total:.1f} s: {parts}"
