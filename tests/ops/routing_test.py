import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.ops.routing import choose, imbalance, uncertainty


def test_the_straight_weight_is_one_and_its_gradient_that_of_the_logarithm():
    logits = jnp.asarray([[0.1, 0.5, -0.2], [1.0, -1.0, 0.0]])

    def weights(logits, straight):
        return choose(jax.nn.softmax(logits), straight)

    choice = weights(logits, True)
    assert choice.expert.tolist() == [1, 0]
    np.testing.assert_array_equal(choice.weight, 1)
    np.testing.assert_allclose(weights(logits, False).weight, jax.nn.softmax(logits).max(1), rtol=1e-6)
    grad = jax.grad(lambda logits: weights(logits, True).weight.sum())(logits)
    exact = jax.grad(lambda logits: jnp.log(weights(logits, False).weight).sum())(logits)
    np.testing.assert_allclose(grad, exact, rtol=1e-5)
    assert np.abs(grad).min() > 0


def test_imbalance_and_uncertainty_have_their_bounds():
    share = jnp.asarray([0.5, 0.25, 0.25])
    even, one = jnp.full((3, 8), 1 / 8), jnp.eye(8)[jnp.zeros(3, int)]
    assert imbalance(even, share) == pytest.approx(0)
    assert imbalance(one, share) == pytest.approx(7)  # E - 1
    assert uncertainty(even, share) == pytest.approx(np.log(8))
    assert uncertainty(one, share) == 0
    apart = jnp.eye(8)[jnp.asarray([0, 1, 1])]  # half the images each
    assert imbalance(apart, share) == pytest.approx(8 / 2 - 1)
    assert np.isfinite(jax.grad(lambda p: uncertainty(p, share))(one)).all()
