"""The train step: accumulation, the non-finite guard, donation, determinism, going on from a copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.methods.mae import MAE
from mae_jax.param_tree import flatten
from mae_jax.rng import stream_key
from mae_jax.training.train_step import gradients
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_state, tiny_step


def assert_identical(first, second):
    first, second = flatten(jax.device_get(first)), flatten(jax.device_get(second))
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


class Counting(MAE):
    """A MAE with extras that the loss and the update change."""

    def loss(self, params, extras, batch, key, step, train):
        loss, (metrics, _) = super().loss(params, {}, batch, key, step, train)
        return loss, (metrics, extras | {"losses": extras["losses"] + 1})

    def after_update(self, params, extras, step):
        return extras | {"updates": extras["updates"] + 1}


CONFIG = tiny_config({"optim.ema": 0.9, "train.duration": "30 steps"})  # its warm-up takes 2


def start():
    return tiny_state(CONFIG, {"losses": jnp.zeros((), jnp.int32), "updates": jnp.zeros((), jnp.int32)})


@pytest.fixture(scope="module")
def step():
    return tiny_step(CONFIG, Counting(CONFIG))


def run(step, state, numbers):
    """Takes a step on each batch number; returns the state and the metrics' sums of every step."""
    sums = []
    for number in numbers:
        state, metrics = step(state, tiny_batch(CONFIG, seed=number))
        sums.append({name: float(total) for name, (total, _) in metrics.items()})
    return state, sums


def test_accumulated_gradients_are_those_of_the_big_batch_also_with_invalid_rows():
    batch = tiny_batch(CONFIG)
    batch["valid"][[0, 4, 5]] = 0  # rows 0 and 4 make one micro-batch, without any valid row

    def compute(accumulate):
        return jax.jit(lambda state, batch: gradients(Counting(CONFIG), state, batch, jax.random.key(0), accumulate))

    whole, metrics, _ = compute(1)(start(), batch)
    parts, sums, extras = compute(4)(start(), batch)
    np.testing.assert_allclose(sums["loss"][0], metrics["loss"][0], rtol=1e-6)
    assert sums["loss"][1] == metrics["loss"][1] == 5
    assert extras["losses"] == 4
    for name, grad in flatten(whole).items():
        np.testing.assert_allclose(flatten(parts)[name], grad, atol=2e-6 * abs(grad).max() + 1e-9, err_msg=name)


def test_a_gradient_that_is_not_finite_changes_nothing_but_step_and_count(step):
    state, _ = run(step, start(), [0, 1])  # moments, averages and extras away from zero
    kept = jax.device_get((state.params, state.opt, state.extras, state.ema))
    broken = tiny_batch(CONFIG)
    broken["valid"][0] = np.nan
    for count in (1, 2):
        state, metrics = step(state, broken)
        assert int(state.bad_steps) == count == metrics["bad_steps"][0]
        assert int(state.step) == 2 + count
        assert_identical((state.params, state.opt, state.extras, state.ema), kept)
    state, _ = run(step, state, [2])
    assert int(state.bad_steps) == 0
    assert int(state.extras["updates"]) == 3
    assert (state.params["encoder"]["norm"]["scale"] != kept[0]["encoder"]["norm"]["scale"]).any()


def test_the_step_gives_its_state_away_and_uses_all_of_it(step):
    old = start()
    new, _ = step(old, tiny_batch(CONFIG))  # a buffer that could not be reused would be a warning, hence an error
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), old) == jax.tree.map(lambda x: (x.shape, x.dtype), new)


def test_two_runs_are_bit_identical(step):
    assert_identical(*(run(step, start(), range(3))[0] for _ in range(2)))


def test_three_steps_and_three_more_from_a_copy_are_six(step):
    straight, sums = run(step, start(), range(6))
    half, first = run(step, start(), range(3))
    copied = jax.tree.map(jnp.asarray, jax.tree.map(np.array, jax.device_get(half)))
    resumed, second = run(step, copied, range(3, 6))
    assert first + second == sums
    assert_identical(resumed, straight)


def test_training_on_one_batch_lowers_its_loss(step):
    _, sums = run(step, start(), [0] * 30)
    assert sums[-1]["loss"] < 0.8 * sums[0]["loss"]


def test_metrics_carry_the_learning_rate_of_the_states_step(step):
    _, sums = run(step, start(), range(3))
    np.testing.assert_allclose([values["lr"] for values in sums], [0, 0.05 / 64, 0.05 / 32], rtol=1e-6)


def test_the_ema_follows_the_parameters_after_the_update(step):
    state, _ = run(step, start(), range(2))
    before = jax.device_get(state.ema)
    state, _ = run(step, state, [2])
    wanted = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * np.asarray(new), before, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, wanted)
    assert (state.ema["encoder"]["norm"]["scale"] != before["encoder"]["norm"]["scale"]).any()


def test_the_ema_of_what_stays_the_same_is_the_same_bit_for_bit_also_with_a_decay_near_one():
    config = tiny_config({"optim.ema": 0.99996, "optim.lr": 0.0})
    state, step = tiny_state(config), tiny_step(config)
    kept = jax.device_get(state.params)
    for number in range(3):
        state, _ = step(state, tiny_batch(config, seed=number))
    assert_identical(state.ema, kept)


def test_random_streams_differ_by_seed_step_and_name_and_by_nothing_else():
    keys = {(seed, step, name): jax.random.key_data(stream_key(seed, step, name)).tobytes()
            for seed in (0, 1) for step in (0, 1) for name in ("loss", "init")}
    assert len(set(keys.values())) == len(keys)
    assert jax.random.key_data(stream_key(1, jnp.int32(1), "loss")).tobytes() == keys[1, 1, "loss"]
