"""The file DONE, which marks a finished run: its last step and, for early stopping, the reason."""

import re
from typing import NamedTuple

from etils import epath

from mae_jax.errors import UserError
from mae_jax.storage.paths import read_bytes, replace_text

MAX_STEP_DIGITS = 18  # maximum number of digits of a step, which fits in 64 bits


class EarlyEnd(NamedTuple):
    """The reason of early stopping: the metric that did not improve, and the step at which it was best."""

    metric: str
    best_step: int

    def __str__(self) -> str:
        return f"{self.metric} was best at step {self.best_step}"


def mark(workdir: epath.Path, done: int, why: EarlyEnd | None) -> None:
    """Writes DONE: the last step and, on a second line, the reason of early stopping."""
    replace_text(workdir / "DONE", f"{done}\n{f'{why}{chr(10)}' if why else ''}")


def early_end(workdir: epath.Path) -> EarlyEnd | None:
    """Returns the reason of early stopping in DONE; None without one."""
    lines = (read_bytes(workdir / "DONE") or b"").decode(errors="replace").splitlines()
    found = re.fullmatch(rf"(\S+) was best at step (\d{{1,{MAX_STEP_DIGITS}}})", lines[1]) if len(lines) > 1 else None
    return EarlyEnd(found[1], int(found[2])) if found else None


def finished(workdir: epath.Path) -> int:
    """Returns the last step in DONE, 0 for an unfinished run; raises UserError for a number that is too long."""
    text = ((read_bytes(workdir / "DONE") or b"").strip().splitlines() or [b""])[0].strip()
    if not text.isdigit():
        return 0
    if len(text) > MAX_STEP_DIGITS:
        raise UserError(f"{workdir / 'DONE'} has a number of {len(text)} digits, which is not a step; remove the "
                        "file, and the run continues from its newest checkpoint")
    return int(text)
