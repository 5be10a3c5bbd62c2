"""Linear probes against scikit-learn, and the recipe against a plain restatement."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mae_jax.evals import linear_probe
from mae_jax.rng import stream_key
from tests.helpers.blobs import CLASSES, blobs


@pytest.mark.parametrize("penalty", [1e-4, 1e-2])
def test_the_linear_probe_is_scikit_learns_logistic_regression(penalty):
    features, labels = blobs(300, seed=0)
    share = np.full(300, 1 / 300, np.float32)
    weights = np.asarray(linear_probe.fit(features, labels, share, penalty, CLASSES))
    # scikit-learn minimizes C · sum of entropies + |W|²/2, ours mean entropy + penalty · |W|².
    peer = LogisticRegression(C=1 / (2 * penalty * len(labels)), tol=1e-8, max_iter=5000).fit(features, labels)
    centered = weights - weights.mean(1, keepdims=True)  # a common shift of all classes changes no probability
    bias = peer.intercept_ - peer.intercept_.mean()
    np.testing.assert_allclose(centered[:-1].T, peer.coef_ - peer.coef_.mean(0), atol=0.02)
    np.testing.assert_allclose(centered[-1], bias, atol=0.02)
    tests, truth = blobs(200, seed=1)
    assert linear_probe.accuracy(weights, tests, truth) == pytest.approx(peer.score(tests, truth), abs=0.01)


def test_a_fit_ends_at_the_same_weights_wherever_it_begins():
    features, labels = blobs(300, seed=0)
    share = np.full(300, 1 / 300, np.float32)
    start = linear_probe.fit(features, labels, share, 1e-1, CLASSES)
    from_zero, from_there = (linear_probe.fit(features, labels, share, 1e-2, CLASSES, at) for at in (None, start))
    np.testing.assert_allclose(from_there, from_zero, atol=1e-3)
    assert np.abs(from_zero - start).max() > 0.1


def test_examples_without_a_share_are_not_fitted():
    features, labels = blobs(300, seed=0)
    share = np.where(np.arange(300) < 200, 1 / 200, 0).astype(np.float32)
    alone = linear_probe.fit(features[:200], labels[:200], share[:200], 1e-2, CLASSES)
    np.testing.assert_allclose(linear_probe.fit(features, labels, share, 1e-2, CLASSES), alone, atol=1e-3)


def test_the_probe_does_not_depend_on_the_scale_of_features():
    train, test = blobs(250, seed=0), blobs(200, seed=1)
    accuracy = linear_probe.top1(train, test, CLASSES)
    assert 0.5 < accuracy < 0.95
    scaled = [(features * 1000 + 5, labels) for features, labels in (train, test)]
    assert linear_probe.top1(*scaled, CLASSES) == pytest.approx(accuracy, abs=0.02)


def test_a_feature_that_never_changes_does_no_harm():
    train, test = ((np.pad(x, ((0, 0), (0, 1))), labels) for x, labels in (blobs(250, seed=0), blobs(200, seed=1)))
    assert linear_probe.top1(train, test, CLASSES) > 0.5


def restated(features: np.ndarray, labels: np.ndarray, lr: float, seed: int) -> np.ndarray:
    """Returns the weights of `linear.descend` at one learning rate: SGD with momentum as a NumPy loop in float64."""
    count, batch = len(labels), -(-len(labels) // linear_probe.STEPS)
    steps = count // batch
    inputs = np.pad(features.astype(np.float64), ((0, 0), (0, 1)), constant_values=1)
    first = 0.01 * jax.random.normal(stream_key(seed, 0, "probe_init"), (features.shape[1], CLASSES))
    weights = np.pad(np.asarray(first, np.float64), ((0, 1), (0, 0)))
    velocity = np.zeros_like(weights)
    for step in range(90 * steps):
        if step % steps == 0:
            order = np.asarray(jax.random.permutation(stream_key(seed, step // steps, "probe_order"), count))
        rows = order[step % steps * batch :][:batch]
        logits = inputs[rows] @ weights
        wrong = np.exp(logits - logits.max(1, keepdims=True))
        wrong /= wrong.sum(1, keepdims=True)
        wrong[np.arange(batch), labels[rows]] -= 1
        velocity = 0.9 * velocity + inputs[rows].T @ wrong / batch
        weights -= lr * batch / 256 * 0.5 * (1 + np.cos(np.pi * step / (90 * steps))) * velocity
    return weights


def test_the_published_probe_is_sgd_with_momentum_and_a_cosine_at_every_rate_of_a_sweep():
    features, labels = blobs(100, seed=0)
    lrs = (0.01, 0.3, 1.0)
    arms = linear_probe.descend(features, labels, np.array(lrs, np.float32), CLASSES, 5)
    assert arms.shape == (3, 13, CLASSES)
    for lr, weights in zip(lrs, arms, strict=True):
        np.testing.assert_allclose(weights, restated(features, labels, lr, 5), atol=1e-3)


def test_the_published_probe_separates_what_can_be_separated():
    train, test = ((features + 9 * np.eye(CLASSES, 12, dtype=np.float32)[labels], labels)
                   for features, labels in (blobs(400, seed=0), blobs(300, seed=1)))
    assert linear_probe.sweep(train, test, CLASSES)[0] == LogisticRegression().fit(*train).score(*test) == 1


def test_where_classes_take_turns_the_held_out_fifth_has_all_of_them():
    labels = np.arange(200) % 10
    held = linear_probe.every_fifth(200)
    assert held.sum() == 40
    assert set(labels[held]) == set(labels[~held]) == set(range(10))


def test_the_published_probe_is_about_as_good_as_logistic_regression_on_classes_that_overlap():
    train, test = blobs(1000, seed=0), blobs(1000, seed=1)
    accuracy, lr = linear_probe.sweep(train, test, CLASSES)
    assert lr in linear_probe.RATES
    assert accuracy == pytest.approx(LogisticRegression().fit(*train).score(*test), abs=0.02)


def test_the_test_pair_has_no_say_in_the_learning_rate():
    train, test = blobs(300, seed=0), blobs(200, seed=1)
    lrs = (1e-6, 0.1, 1e4)
    _, lr = linear_probe.sweep(train, test, CLASSES, lrs=lrs)
    # By these pairs themselves another rate would be the best one.
    for features, labels in ((-test[0], test[1]), (test[0], (test[1] + 1) % CLASSES), (test[0][:1], test[1][:1])):
        assert linear_probe.sweep(train, (features, labels), CLASSES, lrs=lrs)[1] == lr == 0.1


def test_a_validation_pair_chooses_the_learning_rate():
    train, test, validation = blobs(300, seed=0), blobs(200, seed=1), blobs(200, seed=2)
    lrs = (1e-6, 0.1)
    arms = linear_probe.descend(linear_probe.standardize(train[0])[0], train[1], np.array(lrs, np.float32), CLASSES, 0)
    features = linear_probe.standardize(train[0], validation[0])[1]
    untrained = (validation[0], (features @ np.asarray(arms[0, :-1]) + np.asarray(arms[0, -1])).argmax(1))
    assert linear_probe.sweep(train, test, CLASSES, validation=untrained, lrs=lrs)[1] == 1e-6
    assert linear_probe.sweep(train, test, CLASSES, validation=validation, lrs=lrs)[1] == 0.1


def test_the_sweep_is_the_same_twice_and_its_seed_changes_it():
    train = blobs(300, seed=0)
    assert linear_probe.sweep(train, train, CLASSES) == linear_probe.sweep(train, train, CLASSES)
    one, again, other = (linear_probe.descend(*train, np.float32([0.1]), CLASSES, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other, atol=1e-4)


def test_the_chosen_rate_is_trained_anew_on_the_held_out_features_too():
    features, labels = blobs(400, seed=0)
    held = linear_probe.every_fifth(400)
    labels = np.where(held, 3, labels % 3)  # class 3 is among the held-out ones only, and there is no other there
    features[:, 0] = np.where(held, 9, -9)
    test = features[held], labels[held]
    assert linear_probe.sweep((features, labels), test, CLASSES, lrs=(0.1,)) == (1, 0.1)
