"""The two ways in which a run ends early on purpose, and the hints that go with them."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. Its text is the one line that is printed; the exit code is 2."""


class GuardError(Exception):
    """A guard stopped the run (non-finite gradients, too many bad pictures). The exit code is 3."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns the end of an error line: the nearest known name, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known) if known else 'none'}"
