"""Linear probe: multinomial logistic regression on frozen features."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

ITERATIONS = 100  # of L-BFGS; enough for the training loss to settle on the features seen here (our choice)
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)  # L2 strengths tried on a fifth of the training features (our choice)


@partial(jax.jit, static_argnames="classes")
def fit(features: jax.Array, labels: jax.Array, share: jax.Array, penalty: jax.Array, classes: int) -> jax.Array:
    """Minimises Σ share · cross-entropy + penalty · |W|² from zero.

    Args:
      features: float32 [n, D].
      labels: int32 [n].
      share: float32 [n], the weight of each example, summing to 1.
      penalty: L2 strength; the bias is free.
      classes: number of classes.

    Returns:
      float32 [D + 1, classes]; the last row is the bias.
    """
    inputs = jnp.concatenate([features, jnp.ones((features.shape[0], 1))], 1)

    def loss(weights: jax.Array) -> jax.Array:
        entropy = optax.softmax_cross_entropy_with_integer_labels(inputs @ weights, labels)
        return entropy @ share + penalty * jnp.square(weights[:-1]).sum()

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
    kept = (~held / (~held).sum()).astype(np.float32)
    scores = [accuracy(fit(features, labels, kept, penalty, classes), features[held], labels[held])
              for penalty in PENALTIES]
    penalty = PENALTIES[int(np.argmax(scores))]
    everything = np.full(len(labels), 1 / len(labels), np.float32)
    return accuracy(fit(features, labels, everything, penalty, classes), tests, test[1])
