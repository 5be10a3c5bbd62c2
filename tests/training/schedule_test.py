"""Schedules of the learning rate: those of the papers, and their ends."""

import jax
import numpy as np
import pytest

from mae_jax.training import optim
from tests.helpers.tiny import tiny_config, tiny_method

IMAGENET, BATCH = 1_281_167, 4096


def paper_schedule():
    config = tiny_config({"batch_size": BATCH, "train.duration": "800 epochs", "optim.warmup": "40 epochs",
                          "optim.lr": 1.5e-4})
    return optim.make_schedule(tiny_method(config, IMAGENET))


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


def test_the_warm_up_starts_at_its_own_rate_which_no_batch_size_scales():
    config = tiny_config({"batch_size": 512, "train.duration": "100 steps", "optim.warmup": "10 steps",
                          "optim.lr": 1e-3, "optim.warmup_lr": 1e-6, "optim.min_lr": 1e-5})
    schedule = optim.make_schedule(tiny_method(config))
    rates = np.array([schedule(step) for step in range(101)])
    np.testing.assert_allclose(rates[:11], np.linspace(1e-6, 2e-3, 11), rtol=1e-5)
    assert rates[100] == pytest.approx(1e-5)


def test_the_learning_rate_is_a_tenth_after_each_milestone():
    config = tiny_config({"batch_size": 256, "train.duration": "90 steps", "optim.warmup": "10 steps",
                          "optim.lr": 1e-3, "optim.warmup_lr": 1e-6, "optim.milestones": (0.5, 8 / 9)})
    schedule = optim.make_schedule(tiny_method(config))
    rates = np.array([schedule(step) for step in range(90)])
    np.testing.assert_allclose(rates[:11], np.linspace(1e-6, 1e-3, 11), rtol=1e-5)
    np.testing.assert_allclose(rates[10:], [1e-3] * 35 + [1e-4] * 35 + [1e-5] * 10, rtol=1e-5)


def test_the_poly_schedule_falls_from_the_first_step_on_under_its_warm_up():
    """mmsegmentation's: lr (1 - t / T), times 1 - (1 - t / w) (1 - ratio) in the warm-up."""
    config = tiny_config({"batch_size": 16, "train.duration": "160000 steps", "optim.warmup": "1500 steps",
                          "optim.schedule": "poly", "optim.lr": 1.6e-3, "optim.warmup_lr": 1e-10})
    schedule = optim.make_schedule(tiny_method(config))
    places = np.array([0, 1, 750, 1499, 1500, 80_000, 159_999, 160_000])
    wanted = 1e-4 * (1 - places / 160_000) * np.where(places < 1500, 1 - (1 - places / 1500) * (1 - 1e-6), 1)
    np.testing.assert_allclose([schedule(step) for step in places], wanted, rtol=2e-5, atol=1e-12)
    assert optim.poly(1.0, 0.25, 0, 10)(10) == pytest.approx(0.25)
    assert optim.poly(0.0, 0.0, 5, 10)(0) == 0
