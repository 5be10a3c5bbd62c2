"""Where the time to the first step goes: one stop-watch per process, by a clock that nobody sets."""

import itertools
import time

_marks = [("", time.monotonic())]  # a command imports this first


def begin() -> None:
    """Begins to count now, where a summary was the last that happened: a process may train several times."""
    if len(_marks) == 1 and _marks[0][0]:
        _marks[0] = ("", time.monotonic())


def done(name: str) -> None:
    """Ends the phase that began where the one before ended."""
    _marks.append((name, time.monotonic()))


def summary() -> str:
    """Returns 'time to first step 12.3 s: imports 1.2, data 0.8, ...' and starts anew."""
    parts = ", ".join(f"{name} {end - begin:.1f}" for (_, begin), (name, end) in itertools.pairwise(_marks))
    total = _marks[-1][1] - _marks[0][1]
    del _marks[:-1]
    return f"{total:.1f} s: {parts}"
