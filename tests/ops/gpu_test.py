"""What GPUs compute in a way of their own, and a few steps there beside the same on the CPU.

Where there is one: `JAX_PLATFORMS= .venv/bin/python -m pytest -m gpu`.
"""

from collections.abc import Iterator
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.ops import expert_linear, normalization_gpu
from mae_jax.ops.attention import _attention
from mae_jax.ops.homologous_attention import kth_largest
from tests.helpers.gpu import in_jax
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_program, tiny_state, tiny_step
from tests.ops.expert_linear_test import operands, textbook

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")]


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


@pytest.mark.parametrize("tokens", [49, 50, 197])
def test_attention_by_cudnn_is_that_of_any_platform(tokens):
    q, k, v, dout = (jnp.asarray(x, jnp.bfloat16) for x in np.random.default_rng(0).normal(size=(4, 3, tokens, 64)))
    (out, backward), (wanted, exact) = (jax.vjp(partial(_attention, heads=2, kept=None, by=by), q, k, v)
                                        for by in ("cudnn", "plain"))
    for ours, theirs in zip((out, *backward(dout)), (wanted, *exact(dout)), strict=True):
        limit = 2e-2 * np.abs(np.float32(theirs)).max()
        np.testing.assert_allclose(np.float32(ours), np.float32(theirs), rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [384, 512, 768, 1024, 1280])
@pytest.mark.parametrize("residual", [False, True])
def test_the_kernel_of_layer_norm_is_what_it_computes_in_jax(width, dtype, residual):
    rng = np.random.default_rng(0)
    x, dy, dx = (jnp.asarray(array, dtype) for array in rng.normal(size=(3, 11, 197, width)))
    scale, given = jnp.float32(rng.normal(size=width)), (x, dy, dx)[: 2 + residual]

    def gradients(call):
        with mock.patch.object(normalization_gpu, "_call", call):
            return jax.jit(partial(normalization_gpu.backward, eps=1e-6))(x, scale, *given[1:])

    for ours, theirs in zip(gradients(normalization_gpu._call), gradients(in_jax), strict=True):
        limit = (2e-2 if ours.dtype == jnp.bfloat16 else 1e-4) * np.abs(np.float32(theirs)).max()
        np.testing.assert_allclose(np.float32(ours), np.float32(theirs), rtol=0, atol=limit)


def test_steps_that_must_be_deterministic_are():
    config = tiny_config({"model.dtype": "bfloat16", "train.deterministic": True})
    program, ends = tiny_program(config, jax.devices("gpu")[:1]), []
    batch = tiny_batch(config)
    with jax.set_mesh(program.mesh):
        assert "force_deterministic" in program.step.lower(program.state, program.batch).compile().as_text()
        for _ in range(3):
            state = program.init(batch)
            for _ in range(4):
                state, _ = program.step(state, batch)
            ends.append(jax.device_get(state.params))
    for end in ends[1:]:
        jax.tree.map(np.testing.assert_array_equal, end, ends[0])


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
