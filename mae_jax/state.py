"""The train state."""

from typing import Any, NamedTuple

import jax

from mae_jax.methods.base import Extras, Params


class TrainState(NamedTuple):
    """The state of a run, which checkpoints hold.

    Attributes:
      step: int32 [], the index of the next batch.
      params: parameters, float32.
      opt: state of the optimizer.
      extras: state of the method without gradients, such as an EMA teacher.
      ema: moving average of the parameters; {} if `optim.ema` is off.
      bad_steps: int32 [], the number of consecutive steps with non-finite gradients so far.
      history: metrics of recent steps that spikes are compared with; () if `guard.spike` is off.
    """

    step: jax.Array
    params: Params
    opt: Any
    extras: Extras
    ema: Params
    bad_steps: jax.Array
    history: Any = ()
