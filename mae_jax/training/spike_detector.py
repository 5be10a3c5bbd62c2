"""Figures of a step that stand out from those of the steps before: loss spikes.

Ours is the rule of OLMo's skip-step optimizer (mean and deviation of the loss and of the gradient norm over the last
128 steps, 6 deviations), which counts the spikes themselves as well: a run whose loss has changed for good goes on
after some steps.
"""

import jax
import jax.numpy as jnp

WINDOW = 128  # steps that are remembered
History = dict[str, jax.Array]


def no_history(names: tuple[str, ...]) -> History:
    """Returns name → float32 [WINDOW] of the last values, not a number where there is none yet."""
    return {name: jnp.full(WINDOW, jnp.nan, jnp.float32) for name in names}


def remember(history: History, values: dict[str, jax.Array], step: jax.Array) -> History:
    """Returns the history with the values of `step` in place of those of WINDOW steps ago."""
    here = jnp.arange(WINDOW) == step % WINDOW
    return {name: jnp.where(here, values[name], past) for name, past in history.items()}


def stands_out(history: History, values: dict[str, jax.Array], deviations: float) -> jax.Array:
    """Says whether a value is more than so many standard deviations above the mean of the steps before it: bool [].

    Never while fewer than half of them are known; steps that were not finite are not.
    """
    return jnp.any(jnp.stack([_above(past, values[name], deviations) for name, past in history.items()]))


def _above(past: jax.Array, value: jax.Array, deviations: float) -> jax.Array:
    known = jnp.isfinite(past)
    count = jnp.maximum(known.sum(), 1)
    mean = jnp.where(known, past, 0).sum() / count
    variance = jnp.where(known, jnp.square(past - mean), 0).sum() / count
    return (known.sum() >= WINDOW // 2) & (value > mean + deviations * jnp.sqrt(variance))
