"""Figures that stand out, against the rule written down in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.training import spike_detector

NAMES = ("loss", "grad_norm")


@jax.jit
def look(history, values, step):
    return spike_detector.stands_out(history, values, 6.0), spike_detector.remember(history, values, step)


def run(losses):
    """Returns what is said of each loss; the gradient norm stays the same."""
    history, said = spike_detector.no_history(NAMES), []
    for step, loss in enumerate(losses):
        spike, history = look(history, {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1)}, step)
        said.append(bool(spike))
    return said


def test_a_value_far_above_the_last_128_stands_out_as_in_numpy():
    losses = np.random.default_rng(0).normal(2, 0.1, 400).astype(np.float32)
    losses[[30, 100, 300, 301]] = 3.5
    losses[200:250] = np.nan
    expected = []
    for step, loss in enumerate(losses):
        past = losses[max(0, step - spike_detector.WINDOW):step]
        past = past[np.isfinite(past)]
        expected.append(len(past) >= 64 and bool(loss > past.mean() + 6 * past.std()))
    assert run(losses) == expected
    assert [step for step, spike in enumerate(expected) if spike] == [100, 300, 301]


def test_a_loss_that_rose_for_good_is_accepted_after_some_steps():
    said = run([2 + 0.01 * (step % 2) for step in range(128)] + [9.0] * 20)
    assert said[128:] == sorted(said[128:], reverse=True)
    assert 1 <= sum(said) < 10


@pytest.mark.parametrize("name", NAMES)
def test_either_figure_alone_is_enough(name):
    history = {each: jnp.linspace(1, 2, spike_detector.WINDOW) for each in NAMES}
    values = {each: jnp.float32(1.5) for each in NAMES}
    assert not spike_detector.stands_out(history, values, 6.0)
    assert spike_detector.stands_out(history, values | {name: jnp.float32(5)}, 6.0)
    assert not spike_detector.stands_out(history, values | {name: jnp.float32(-5)}, 6.0)
