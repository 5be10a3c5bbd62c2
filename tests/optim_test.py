"""Schedule, decay mask and one AdamW step against formulas written out in NumPy."""

import jax
import numpy as np
import optax
import pytest

from mae_jax import optim
from mae_jax.params import flatten
from tests.tiny import tiny_config, tiny_params

IMAGENET, BATCH = 1_281_167, 4096


def paper_schedule():
    config = tiny_config({"batch_size": BATCH, "train.duration": "800 epochs", "optim.warmup": "40 epochs",
                          "optim.lr": 1.5e-4})
    return optim.make_schedule(config, IMAGENET)


def test_the_papers_learning_rate_rises_to_2_4e_3_in_40_epochs_and_falls_to_0_in_800():
    schedule = paper_schedule()
    warmup, total = 40 * IMAGENET // BATCH, 800 * IMAGENET // BATCH
    assert schedule(0) == 0
    assert schedule(warmup) == pytest.approx(2.4e-3, rel=1e-6)
    assert schedule(warmup // 2) == pytest.approx(1.2e-3, rel=1e-3)
    assert schedule((warmup + total) // 2) == pytest.approx(1.2e-3, rel=1e-3)
    assert schedule(total) == pytest.approx(0, abs=1e-9)
    assert schedule(total + 5) == pytest.approx(0, abs=1e-9)


def test_the_learning_rate_changes_every_step():
    rates = np.array(jax.jit(jax.vmap(paper_schedule()))(np.arange(1000)))
    np.testing.assert_allclose(np.diff(rates), 2.4e-3 / (40 * IMAGENET // BATCH), rtol=1e-2)


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (10, 10), (3, 3)])
def test_schedules_without_warmup_or_without_decay_are_finite(warmup, total):
    rates = [float(optim.warmup_cosine(1.0, 0.1, warmup, total)(step)) for step in range(total + 1)]
    assert np.isfinite(rates).all()
    assert max(rates) == 1


def test_the_minimum_is_reached_at_the_end():
    assert optim.warmup_cosine(1.0, 0.25, 2, 10)(10) == pytest.approx(0.25)


def test_only_kernels_and_the_class_and_mask_tokens_decay():
    params = tiny_params(tiny_config({"method.encoder_mask_tokens": True}))
    decayed = {name for name, decays in flatten(optim.decay_mask(params)).items() if decays}
    assert decayed == {name for name in flatten(params) if name.endswith(("kernel", "cls_token", "mask_token"))}
    kept = {name.rsplit("/", 1)[-1] for name in flatten(params).keys() - decayed}
    assert kept == {"bias", "scale"}


def test_the_decay_mask_goes_by_name_also_on_stacked_leaves():
    stacked = {"norm": {"scale": np.zeros((12, 8)), "bias": np.zeros((12, 8))}, "fc": {"kernel": np.zeros((12, 8, 8))}}
    assert optim.decay_mask(stacked) == {"norm": {"scale": False, "bias": False}, "fc": {"kernel": True}}


def test_updates_are_those_of_pytorchs_adamw():
    config = tiny_config({"optim.weight_decay": 0.1, "optim.betas": (0.8, 0.9), "optim.eps": 1e-3})
    optimizer, rng, lr = optim.make_optimizer(config), np.random.default_rng(0), 0.3
    params = {"kernel": rng.normal(size=(3, 2)).astype(np.float32), "bias": rng.normal(size=2).astype(np.float32)}
    wanted = {name: value.astype(np.float64) for name, value in params.items()}
    first, second = ({name: np.zeros(value.shape) for name, value in params.items()} for _ in range(2))
    state = optimizer.init(params)
    for t in range(1, 4):
        grads = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in params.items()}
        updates, state = optimizer.update(grads, state, params)
        params = {name: params[name] - lr * updates[name] for name in params}
        for name, grad in grads.items():
            wanted[name] *= 1 - lr * (0.1 if name == "kernel" else 0)
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.9 * second[name] + 0.1 * grad**2
            denominator = np.sqrt(second[name] / (1 - 0.9**t)) + 1e-3
            wanted[name] -= lr * first[name] / (1 - 0.8**t) / denominator
    for name in params:
        np.testing.assert_allclose(params[name], wanted[name], rtol=1e-5)


def test_clipping_bounds_the_global_norm_before_adam():
    config = tiny_config({"optim.clip": 1.0, "optim.weight_decay": 0.0})
    optimizer = optim.make_optimizer(config)
    params = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    grads = {"a": np.array([30, 0], np.float32), "b": np.array([0, 40], np.float32)}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = next(part.mu for part in state if isinstance(part, optax.ScaleByAdamState))
    np.testing.assert_allclose(np.concatenate([moments["a"], moments["b"]]), [0.06, 0, 0, 0.08], rtol=1e-5)
