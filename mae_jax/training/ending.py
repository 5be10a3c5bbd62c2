"""DONE, the file that says that a run has finished: at which step and, where that was early, why."""

import re
from typing import NamedTuple

from etils import epath

from mae_jax.errors import UserError
from mae_jax.storage.paths import read_bytes, replace_text

MAX_STEP_DIGITS = 18  # of a step's number: what 64 bits hold


class EarlyEnd(NamedTuple):
    """Why a run ended before its last step: the figure that was to get better, and the step at which it was best."""

    metric: str
    best_step: int

    def __str__(self) -> str:
        return f"{self.metric} was best at step {self.best_step}"


def mark(workdir: epath.Path, done: int, why: EarlyEnd | None) -> None:
    """Writes DONE: the last step and, on a second line, why it ended early."""
    replace_text(workdir / "DONE", f"{done}\n{f'{why}{chr(10)}' if why else ''}")


def early_end(workdir: epath.Path) -> EarlyEnd | None:
    """Returns why the run ended early, as DONE says; None where it did not."""
    lines = (read_bytes(workdir / "DONE") or b"").decode(errors="replace").splitlines()
    found = re.fullmatch(rf"(\S+) was best at step (\d{{1,{MAX_STEP_DIGITS}}})", lines[1]) if len(lines) > 1 else None
    return EarlyEnd(found[1], int(found[2])) if found else None


def finished(workdir: epath.Path) -> int:
    """Returns the step that DONE names, 0 where the run has not finished; raises UserError for a number of no step."""
    text = ((read_bytes(workdir / "DONE") or b"").strip().splitlines() or [b""])[0].strip()
    if not text.isdigit():
        return 0
    if len(text) > MAX_STEP_DIGITS:
        raise UserError(f"{workdir / 'DONE'} holds a number of {len(text)} digits, which is no step; remove the file, "
                        "and the run goes on from its newest checkpoint")
    return int(text)
