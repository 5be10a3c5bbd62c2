"""The train state: all that a checkpoint holds."""

from typing import Any, NamedTuple

import jax

from mae_jax.methods.base import Extras, Params


class TrainState(NamedTuple):
    """All that a checkpoint holds. `step` numbers the next batch; `bad_steps` counts non-finite ones in a row.

    `history` holds what loss spikes are measured against, where `guard.spike` is on.
    """

    step: jax.Array
    params: Params
    opt: Any
    extras: Extras
    ema: Params
    bad_steps: jax.Array
    history: Any = ()
