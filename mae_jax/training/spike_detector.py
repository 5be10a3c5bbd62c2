"""Detection of loss spikes: steps whose loss or gradient norm is far above those of previous steps.

The rule is that of OLMo's skip-step optimizer: mean and standard deviation of the loss and of the gradient norm over
the last 128 steps, with a threshold of 6 deviations. Spikes count in the mean, so that a run whose loss has changed
permanently continues after some steps.
"""

import jax
import jax.numpy as jnp

WINDOW = 128  # number of stored steps
History = dict[str, jax.Array]


def no_history(names: tuple[str, ...]) -> History:
    """Returns an empty history: name → float32 [WINDOW] of NaN."""
    return {name: jnp.full(WINDOW, jnp.nan, jnp.float32) for name in names}


def remember(history: History, values: dict[str, jax.Array], step: jax.Array) -> History:
    """Returns the history with the values float32 [] of `step` in place of those of WINDOW steps ago."""
    here = jnp.arange(WINDOW) == step % WINDOW
    return {name: jnp.where(here, values[name], past) for name, past in history.items()}


def stands_out(history: History, values: dict[str, jax.Array], deviations: float) -> jax.Array:
    """Returns whether a value is more than `deviations` standard deviations above the mean of its history, bool [].

    False while fewer than half of the WINDOW values are known; non-finite values do not count.
    """
    return jnp.any(jnp.stack([_above(past, values[name], deviations) for name, past in history.items()]))


def _above(past: jax.Array, value: jax.Array, deviations: float) -> jax.Array:
    known = jnp.isfinite(past)
    count = jnp.maximum(known.sum(), 1)
    mean = jnp.where(known, past, 0).sum() / count
    variance = jnp.where(known, jnp.square(past - mean), 0).sum() / count
    return (known.sum() >= WINDOW // 2) & (value > mean + deviations * jnp.sqrt(variance))
