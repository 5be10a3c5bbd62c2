import numpy as np
import pytest

from mae_jax.rng import permutation, rng


def test_an_address_always_gives_the_same_draws():
    assert rng(3, "augment", 77, 1).random() == rng(3, "augment", 77, 1).random()


@pytest.mark.parametrize("other", [(4, "augment", 77, 1), (3, "order", 77, 1), (3, "augment", 78, 1),
                                   (3, "augment", 77, 2), (-3, "augment", 77, 1)])
def test_every_part_of_the_address_matters(other):
    assert rng(3, "augment", 77, 1).random() != rng(*other).random()


def test_every_epoch_is_a_permutation_and_no_two_are_alike():
    orders = [permutation(0, epoch, 100) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(100))
    assert not np.array_equal(orders[0], orders[1])


def test_over_many_epochs_an_example_visits_every_place_alike_often():
    size, epochs = 10, 4000
    places = np.array([np.argmax(permutation(5, epoch, size) == 3) for epoch in range(epochs)])
    counts = np.bincount(places, minlength=size)
    chi_square = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    assert chi_square < 27.9  # 0.999 quantile at 9 degrees of freedom


def test_neighboring_seeds_do_not_share_draws():
    draws = {rng(seed, "order", position).random() for seed in range(50) for position in range(50)}
    assert len(draws) == 2500
