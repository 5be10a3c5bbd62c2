"""Cases of a parametrized test that are not of the fast tier."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Returns a case of pytest.mark.parametrize that is marked slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def all_slow_but(fast: tuple[Any, ...], values: Any) -> list[Any]:
    """Returns the values as cases, those of `fast` alone not marked slow."""
    return [value if value in fast else slow(value) for value in values]
