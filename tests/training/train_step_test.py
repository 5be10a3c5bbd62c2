"""The train step: accumulation, skipped steps under any optimizer, donation, determinism, going on from a copy."""

import re
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.config import default, fitting_mesh, with_fitting_mesh
from mae_jax.errors import UserError
from mae_jax.evals.frozen_encoder import frozen
from mae_jax.methods.base import Method
from mae_jax.methods.mae import MAE
from mae_jax.param_tree import flatten
from mae_jax.rng import stream_key
from mae_jax.runtime import exit
from mae_jax.training.train_step import TrainStep, build_train_step, gradients, init_state, only_if
from tests.helpers.tiny import TINY_DATA, tiny_batch, tiny_config, tiny_state, tiny_step


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
    return tiny_step(CONFIG, Counting(CONFIG, TINY_DATA))


def run(step, state, numbers):
    """Takes a step on each batch number; returns the state and the metrics' sums of every step."""
    sums = []
    for number in numbers:
        state, metrics = step(state, tiny_batch(CONFIG, seed=number))
        sums.append({name: float(total) for name, (total, _) in metrics.items()})
    return state, sums


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_big_batch_also_with_invalid_rows():
    batch = tiny_batch(CONFIG)
    batch["valid"][[0, 4, 5]] = 0  # rows 0 and 4 make one micro-batch, without any valid row

    def compute(accumulate):
        method = Counting(CONFIG, TINY_DATA)
        return jax.jit(lambda state, batch: gradients(method, state, batch, jax.random.key(0), accumulate))

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


class Perceptron(Method):
    """Two layers on vectors, which compile fast; with extras that the loss and the update change."""

    def init(self, key, batch):
        first, second = jax.random.normal(key, (2, 16, 16))
        params = {name: {"kernel": kernel, "bias": jnp.zeros(16)} for name, kernel in (("a", first), ("b", second))}
        return params, {"seen": jnp.zeros(16), "updates": jnp.zeros((), jnp.int32)}

    def loss(self, params, extras, batch, key, step, train):
        hidden = jnp.tanh(batch["x"] @ params["a"]["kernel"] + params["a"]["bias"])
        loss = jnp.square(hidden @ params["b"]["kernel"] + params["b"]["bias"] - batch["y"]).mean()
        return loss, ({"loss": (loss, jnp.ones(()))}, extras | {"seen": extras["seen"] + batch["y"][0]})

    def after_update(self, params, extras, step):
        return extras | {"updates": extras["updates"] + 1}


def downhill(optimizer):
    """Returns a whole optimizer, with a learning rate of its own, as a rule: its updates are subtracted."""
    return optax.chain(optimizer, optax.scale(-1))


ANY_RULES = {  # none knows of steps that are skipped
    "adam": optax.scale_by_adam(), "amsgrad": optax.scale_by_amsgrad(), "lion": optax.scale_by_lion(),
    "adopt": optax.contrib.scale_by_adopt(), "ademamix": optax.contrib.scale_by_ademamix(),
    "factored_rms": optax.scale_by_factored_rms(min_dim_size_to_factor=8),
    "muon": downhill(optax.contrib.muon(1.0)), "prodigy": downhill(optax.contrib.prodigy(1.0)),
    "schedule_free": downhill(optax.contrib.schedule_free_adamw(1.0)),
}


def vectors(seed):
    x, y = np.random.default_rng(seed).normal(size=(2, 8, 16)).astype(np.float32)
    return {"x": x, "y": y, "replaced": np.zeros(8, np.int32)}


def own(tree):
    """Returns the tree in buffers of its own."""
    return jax.tree.map(lambda leaf: jnp.array(np.array(leaf)), tree)


@pytest.fixture(scope="module", params=ANY_RULES)
def any_rule(request):
    """A compiled step of one of the rules, and the state before it, which knows what losses and norms are usual."""
    config = tiny_config({"optim.ema": 0.9, "guard.spike": 6.0})
    optimizer = optax.with_extra_args_support(ANY_RULES[request.param])
    state = init_state(Perceptron(config, TINY_DATA), optimizer, vectors(0))
    usual = {name: np.linspace(0, 40, len(past)).astype(np.float32) for name, past in state.history.items()}
    state = own(state._replace(history=usual))
    step = jax.jit(build_train_step(Perceptron(config, TINY_DATA), optimizer, lambda step: 0.01), donate_argnums=0)
    return step.lower(state, vectors(0)).compile(), state


@pytest.mark.parametrize(("bad", "counted"), [(np.nan, "bad_steps"), (1e4, "spikes")])
def test_a_skipped_step_of_any_rule_changes_nothing_and_the_next_is_as_if_it_had_not_been(any_rule, bad, counted):
    def parts(state):
        return jax.tree.map(np.array, (state.params, state.opt, state.extras, state.ema))

    step, start = any_rule
    state, _ = step(own(start), vectors(0))
    assert jax.tree.leaves(state.opt)
    params, opt, extras, ema = kept = parts(state)
    skipped, metrics = step(state, vectors(1) | {"y": vectors(1)["y"] * bad})
    assert metrics[counted][0] == 1
    assert_identical(parts(skipped), kept)
    assert int(skipped.step) == 2
    never = own(skipped._replace(params=params, opt=opt, extras=extras, ema=ema))
    after, metrics = step(skipped, vectors(2))
    assert metrics["bad_steps"][0] == metrics["spikes"][0] == 0
    wanted = parts(step(never, vectors(2))[0])
    assert_identical(parts(after), wanted)
    assert int(after.extras["updates"]) == 2
    for old, new in zip(kept, wanted, strict=True):
        assert any((before != now).any() for before, now in zip(*map(jax.tree.leaves, (old, new)), strict=True))


def test_no_rule_makes_the_step_copy_what_it_was_given(any_rule):
    step, _ = any_rule
    assert re.findall(r" copy\([^)]*?(state_(?:opt|params|ema)_\w*(?:kernel|bias)\w*)", step.as_text()) == []


def next_values(kept):
    return {"a": kept["a"] + 1, "b": jnp.sqrt(kept["b"] - 1)}


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_accelerators_choose_between_old_and_new_and_only_cpus_loop(platform):
    kept = {"a": jnp.arange(3), "b": jnp.zeros(2)}
    traced = jax.jit(only_if, static_argnums=1).trace(jnp.array(True), next_values, kept)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text, "stablehlo.select" in text) == ((True, False) if platform == "cpu" else
                                                                       (False, True))


@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("apply_update", [False, True])
def test_new_values_are_kept_only_if_the_step_is_taken(platform, apply_update, monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, **ways: ways[platform](*args))
    kept = {"a": jnp.arange(3), "b": jnp.zeros(2)}
    assert_identical(only_if(jnp.array(apply_update), next_values, kept), next_values(kept) if apply_update else kept)


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


@pytest.mark.slow
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


@pytest.mark.parametrize(("method", "fields", "says"), [
    ("mae", {}, r"model\.heads=2 .*mesh\.tensor=4"),
    ("mae", {"model.heads": 4}, r"method\.decoder_heads=2 .*mesh\.tensor=4"),
    ("splitmask", {"model.heads": 4}, r"method\.decoder_heads=2 .*mesh\.tensor=4")])
def test_heads_that_the_mesh_does_not_divide_are_refused_and_looked_at_on_another_mesh(method, fields, says,
                                                                                       monkeypatch):
    monkeypatch.setattr("mae_jax.runtime.sharding.make_mesh", lambda *args: SimpleNamespace(shape={"tensor": 4}))
    config = tiny_config({"mesh.tensor": 4, **fields}, method)
    with pytest.raises(UserError, match=says):
        fitting_mesh(config)
    assert with_fitting_mesh(config).mesh == default(method).mesh


@pytest.mark.parametrize("fields", [{"mesh.fsdp": 8}, {"mesh.reduce": "bfloat16"}])
def test_an_encoder_of_a_run_on_a_mesh_that_is_not_here_is_looked_at_on_what_is(fields):
    config = frozen(tiny_config(fields), -1)
    assert config.mesh == default().mesh
    assert frozen(tiny_config(), -1).mesh == tiny_config().mesh  # which is not the default: it fits


def test_what_compiles_ahead_raises_where_the_step_is_waited_for_and_not_before(monkeypatch):
    program = TrainStep(Counting(CONFIG, TINY_DATA), fitting_mesh(CONFIG))
    monkeypatch.setattr(program, "step", SimpleNamespace(lower=lambda *shapes: 1 / 0))
    program.compile_ahead()
    with pytest.raises(ZeroDivisionError):
        program.compile()


def test_what_compiled_ahead_is_not_compiled_again_and_leaves_no_thread(monkeypatch):
    program = TrainStep(MAE(CONFIG, TINY_DATA), fitting_mesh(CONFIG))
    lowered, lower = [], program.step.lower
    spy = SimpleNamespace(lower=lambda *shapes: lowered.append(shapes) or lower(*shapes))
    monkeypatch.setattr(program, "step", spy)
    program.compile_ahead()
    program.compile()
    assert len(lowered) == 1
    for thread in threading.enumerate():
        if thread.name.startswith("compile"):
            thread.join(10)
    assert not any(thread.name.startswith("compile") for thread in threading.enumerate())


def test_nobody_waits_for_a_compilation_that_is_given_up(monkeypatch):
    program, given_up = TrainStep(MAE(CONFIG, TINY_DATA), fitting_mesh(CONFIG)), threading.Event()
    monkeypatch.setattr(program, "step", SimpleNamespace(lower=lambda *shapes: given_up.wait() and 1 / 0))
    said = []
    monkeypatch.setattr(exit, "wait_for_no_thread", lambda: said.append(True))
    program.leave()
    program.compile_ahead()
    assert not said
    program.leave()
    given_up.set()
    assert said == [True]
