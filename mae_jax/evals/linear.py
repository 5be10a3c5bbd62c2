"""Linear probe: multinomial logistic regression on frozen features."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

ITERATIONS = 100  # of L-BFGS; enough for the training loss to settle on the features seen here (our choice)
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)  # L2 strengths tried on a fifth of the training features (our choice)


def fit(features: jax.Array, labels: jax.Array, classes: int, penalty: jax.Array) -> jax.Array:
    """Returns weights [D + 1, classes] (the last row is the bias) that minimise mean cross-entropy + penalty · |W|²."""
    inputs = jnp.concatenate([features, jnp.ones((features.shape[0], 1))], 1)

    def loss(weights: jax.Array) -> jax.Array:
        entropy = optax.softmax_cross_entropy_with_integer_labels(inputs @ weights, labels).mean()
        return entropy + penalty * jnp.square(weights[:-1]).sum()

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def iterate(carry: tuple[jax.Array, optax.OptState], _: None) -> tuple[tuple[jax.Array, optax.OptState], None]:
        weights, state = carry
        value, grad = value_and_grad(weights, state=state)
        updates, state = optimizer.update(grad, state, weights, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(weights, updates), state), None

    weights = jnp.zeros((inputs.shape[1], classes))
    (weights, _), _ = jax.lax.scan(iterate, (weights, optimizer.init(weights)), None, ITERATIONS)
    return weights


_fit = jax.jit(fit, static_argnums=2)


def accuracy(weights: jax.Array, features: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of features [n, D] whose best class is their label."""
    logits = np.asarray(features @ np.asarray(weights[:-1]) + np.asarray(weights[-1]))
    return float((logits.argmax(1) == labels).mean())


def top1(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], classes: int) -> float:
    """Fits on (features [n, D], labels [n]) and returns the accuracy on another such pair.

    Features are standardised by the training ones, as the affine-free batch norm of MAE's probe does it (A.1). The
    penalty is chosen on every fifth training feature, held out; the test pair is read once.
    """
    features, labels = train
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    features, tests = (features - mean) / deviation, (test[0] - mean) / deviation
    held = np.arange(len(labels)) % 5 == 4
    scores = [accuracy(_fit(features[~held], labels[~held], classes, penalty), features[held], labels[held])
              for penalty in PENALTIES]
    penalty = PENALTIES[int(np.argmax(scores))]
    return accuracy(_fit(features, labels, classes, penalty), tests, test[1])
