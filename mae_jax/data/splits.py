"""Split expressions: 'train', 'test[:10%]', 'train[100:500]', with the meaning that TFDS gives them."""

import re
from typing import NamedTuple

from mae_jax.errors import UserError

_EXPRESSION = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\])?")


class Split(NamedTuple):
    """A named part of a data set and the slice of it that is meant."""

    name: str
    start: str = ""  # '' | '500' | '10%'
    stop: str = ""

    @property
    def percents(self) -> tuple[int, int] | None:
        """The slice in percent, (0, 100) for the whole split; None when a bound counts examples."""
        if any(bound and not bound.endswith("%") for bound in (self.start, self.stop)):
            return None
        return int(self.start[:-1] or 0), int(self.stop[:-1] or 100)

    def bounds(self, size: int) -> tuple[int, int]:
        """Returns first and one-past-last index of the slice of a split of `size` examples."""
        start, stop = _index(self.start or "0%", size), _index(self.stop or "100%", size)
        return start, max(start, stop)

    def __str__(self) -> str:
        return f"{self.name}[{self.start}:{self.stop}]" if self.start or self.stop else self.name


def parse(expression: str) -> Split:
    """Reads a split expression; raises UserError."""
    match = _EXPRESSION.fullmatch(expression.strip())
    if not match:
        raise UserError(f"cannot read the split {expression!r}; write 'train', 'train[:10%]' or 'train[100:500]'")
    split = Split(match["name"], match["start"] or "", match["stop"] or "")
    for bound in (split.start, split.stop):
        if bound.endswith("%") and int(bound[:-1]) > 100:
            raise UserError(f"the split {expression!r} goes past 100%")
    return split


def _index(bound: str, size: int) -> int:
    """Converts a bound to an index; percents round to the closest example, as TFDS does."""
    if bound.endswith("%"):
        return round(int(bound[:-1]) * size / 100)
    return min(int(bound), size)
