"""Which fields the command line sets: a recipe is made before they are, and `runlocal` has to know."""

import contextlib
from collections.abc import Collection, Iterator

_given: set[str] = set()  # dotted names


@contextlib.contextmanager
def given(fields: Collection[str]) -> Iterator[None]:
    """Has the recipe that is made meanwhile know the fields that are set afterwards, by their dotted names."""
    before = set(_given)
    _given.clear()
    _given.update(fields)
    try:
        yield
    finally:
        _given.clear()
        _given.update(before)


def own_data() -> bool:
    """Says whether the command line names data for the recipe's own source, which `runlocal` has to leave alone.

    Where it names the source too, it is another one, and what the recipe says of its own does not hold.
    """
    return bool(_given & {"data.path", "data.name"}) and "data.source" not in _given
