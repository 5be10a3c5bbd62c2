"""What GPUs compute in a way of their own, and a few steps there beside the same on the CPU.

Where there is one: `JAX_PLATFORMS= .venv/bin/python -m pytest -m gpu`.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.ops import expert_linear
from mae_jax.ops.homologous_attention import kth_largest
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_state, tiny_step
from tests.ops.expert_linear_test import operands, textbook

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    with jax.default_device(jax.devices("gpu")[0]), jax.default_matmul_precision("highest"):
        yield


def test_the_kth_largest_is_exact():
    values = np.random.default_rng(0).normal(size=(3, 5, 40)).astype(np.float32)
    np.testing.assert_array_equal(kth_largest(jnp.asarray(values), 7), np.sort(values, -1)[..., -7, None])


def test_expert_products_and_gradients_are_those_of_a_loop_over_images():
    x, kernel, bias, dy, expert = operands()
    y, backward = jax.vjp(partial(expert_linear.expert_linear, expert=jnp.asarray(expert)), x, kernel, bias)
    wanted, exact = jax.vjp(partial(textbook, expert=expert), x, kernel, bias)
    for ours, theirs in zip((y, *backward(dy)), (wanted, *exact(dy)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def losses() -> list[float]:
    """Returns the losses of four steps on the default device."""
    config, found = tiny_config({"optim.lr": 0.001}), []
    step, state = tiny_step(config), tiny_state(config)
    for seed in range(4):
        state, metrics = step(state, tiny_batch(config, seed))
        found.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return found


def test_steps_are_those_of_a_cpu():
    here = losses()
    with jax.default_device(jax.devices("cpu")[0]):
        np.testing.assert_allclose(here, losses(), rtol=1e-4)
