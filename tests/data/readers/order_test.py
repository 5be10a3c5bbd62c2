"""The order of an epoch of data with random access: computed for new runs, drawn as a whole for those from before."""

import hashlib
import math
import time

import numpy as np
import pytest

from mae_jax import rng
from mae_jax.data.readers import random_access
from mae_jax.rng import example_at, permutation
from tests.helpers.tiny import tiny_config


def order(seed, epoch, size):
    return example_at(seed, epoch, size, np.arange(size, dtype=np.uint64)).astype(np.int64)


def short(values):
    return hashlib.sha256(np.ascontiguousarray(values, np.int64).tobytes()).hexdigest()[:16]


def shown(config, size, positions):
    return [next(random_access._candidates(size, 1, config, position)) for position in positions]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1023, 12_345])
def test_every_epoch_visits_every_example_once(size):
    assert sorted(order(3, 7, size)) == list(range(size))
    assert order(3, 7, size)[:40].tolist() == [example_at(3, 7, size, place) for place in range(min(size, 40))]


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {short(order(seed, epoch, 1000)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def chi_square(counts, expected):
    """In standard deviations above its mean, by the normal approximation of many degrees of freedom."""
    found, freedom = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
    return (found - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [7, 12, 30])
def test_examples_are_at_all_places_and_follow_one_another_alike_often(size):
    epochs = 3000
    orders = np.stack([order(5, epoch, size) for epoch in range(epochs)])
    at = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    assert abs(chi_square(at, epochs / size)) < 5
    pairs = np.bincount((orders[:, :-1] * size + orders[:, 1:]).ravel(), minlength=size * size).reshape(size, size)
    assert abs(chi_square(pairs[~np.eye(size, dtype=bool)], epochs / size)) < 5
    following = np.bincount(((orders[:, 1:] - orders[:, :-1]) % size).ravel(), minlength=size)[1:]
    assert abs(chi_square(following, epochs)) < 5


def test_all_orders_of_a_few_examples_come_alike_often():
    codes = [int("".join(map(str, order(1, epoch, 5)))) for epoch in range(6000)]
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == 120
    assert abs(chi_square(counts, 50)) < 5


def test_within_a_large_epoch_neighbors_have_nothing_to_do_with_one_another():
    size = 1_000_003
    found = order(0, 0, size)
    assert np.array_equal(np.sort(found), np.arange(size))
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.005
    assert abs(np.corrcoef(found, order(0, 1, size))[0, 1]) < 0.005
    fixed = (found == np.arange(size)).sum()
    assert fixed < 10  # one is expected


def test_a_billion_examples_cost_no_more_than_a_few():
    rng._keys.cache_clear()
    began = time.process_time()
    found = [example_at(0, 3, 10**9, place) for place in range(1000)]
    assert len(set(found)) == 1000
    assert max(found) > 2**29
    assert time.process_time() - began < 1


def test_the_orders_are_those_that_runs_have_been_trained_in():
    assert short(permutation(0, 0, 1000)) == "e58890c7d80a8dec"
    assert short(order(0, 0, 1000)) == "3c568015c61cce12"


def test_a_run_from_before_keeps_its_order_and_a_new_one_is_computed():
    old, new = tiny_config({"recipe_version": 4}), tiny_config()
    size, positions = 50, range(120)
    drawn = np.concatenate([permutation(old.seed, epoch, size) for epoch in range(3)])
    assert shown(old, size, positions) == drawn[:120].tolist()
    computed = np.concatenate([order(new.seed, epoch, size) for epoch in range(3)])
    assert shown(new, size, positions) == computed[:120].tolist()
    np.testing.assert_array_equal(random_access.subset(50, 10, 1, False),
                                  np.sort(rng.rng(0, "subset", 0).permutation(50)[:10]))
    found = random_access.subset(10**9, 1000)
    assert len(np.unique(found)) == 1000
    assert np.array_equal(found, np.sort(found))
