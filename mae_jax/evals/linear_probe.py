"""Linear probes on frozen features: multinomial logistic regression, and the published recipe with SGD."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mae_jax.evals.base import Probe
from mae_jax.evals.context import Pair
from mae_jax.rng import rng, stream_key

TOLERANCE = 1e-4  # norm of the gradient, relative to that at zero weights, at which a fit stops (our choice)
ITERATIONS = 200  # maximum of L-BFGS iterations: features of low rank converge slowly (our choice)
PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5)  # L2 strengths, compared on a fifth of the training features (our choice)

# The published probe (MAE Table 10, with SGD instead of LARS, which its caption calls equally good): 90 epochs,
# momentum 0.9, no weight decay, weights of standard deviation 0.01, cosine schedule. There is no warm-up, and no
# augmentation, since features are computed once.
EPOCHS = 90
MOMENTUM = 0.9
DEVIATION = 0.01
BATCH = 4096  # maximum batch size, as in that caption; a small set is split into STEPS steps per epoch (our choice)
STEPS = 16
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # learning rates per 256 examples, as optim.lr (our choice)


class LinearProbe(Probe):
    """Top-1 of held-out images by a logistic regression fitted on the training split."""

    name, metric = "linear_probe", "linear/top1"

    def accuracy(self, train: Pair, test: Pair, classes: int, c: ConfigDict) -> float:
        return top1(train, test, classes)


@partial(jax.jit, static_argnames="classes")
def fit(features: jax.Array, labels: jax.Array, share: jax.Array, penalty: jax.Array, classes: int,
        start: jax.Array | None = None) -> jax.Array:
    """Minimizes Σ share · cross-entropy + penalty · |W|².

    Args:
      features: float32 [n, D].
      labels: int32 [n].
      share: float32 [n], the weight of each example, summing to 1.
      penalty: L2 strength; the bias is not penalized.
      classes: number of classes.
      start: initial weights float32 [D + 1, classes], such as the fit of a stronger penalty; None: zero.

    Returns:
      float32 [D + 1, classes]; the last row is the bias.
    """
    inputs = jnp.concatenate([features, jnp.ones((features.shape[0], 1))], 1)
    zero = jnp.zeros((inputs.shape[1], classes))
    start = zero if start is None else start

    def loss(weights: jax.Array) -> jax.Array:
        # In bfloat16, the default precision of TPUs, the line search could not resolve its last steps.
        logits = jnp.matmul(inputs, weights, precision="highest")
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return entropy @ share + penalty * jnp.square(weights[:-1]).sum()

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)
    small = TOLERANCE * jnp.linalg.norm(jax.grad(loss)(zero))

    def unsettled(carry: tuple[jax.Array, optax.OptState, jax.Array, jax.Array]) -> jax.Array:
        _, _, turn, norm = carry
        return (turn < ITERATIONS) & (norm > small)

    def iterate(carry: tuple[jax.Array, optax.OptState, jax.Array, jax.Array]) -> tuple[Any, ...]:
        weights, state, turn, _ = carry
        value, grad = value_and_grad(weights, state=state)
        updates, state = optimizer.update(grad, state, weights, value=value, grad=grad, value_fn=loss)
        # The state holds the gradient at the end point of the line search.
        return optax.apply_updates(weights, updates), state, turn + 1, jnp.linalg.norm(optax.tree.get(state, "grad"))

    return jax.lax.while_loop(unsettled, iterate, (start, optimizer.init(start), jnp.int32(0), jnp.float32(jnp.inf)))[0]


def accuracy(weights: jax.Array, features: np.ndarray, labels: np.ndarray) -> float:
    """Returns the accuracy in 0..1 of weights [D + 1, C] on features [n, D] with labels [n]."""
    logits = np.asarray(features @ np.asarray(weights[:-1]) + np.asarray(weights[-1]))
    return float((logits.argmax(1) == labels).mean())


def standardize(features: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Standardizes features [n, D], and `others` [m, D] with the same mean and deviation: MAE's batch norm (A.1)."""
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    return [(x - mean) / deviation for x in (features, *others)]


def every_fifth(count: int) -> np.ndarray:
    """Returns bool [count]: a random fifth of the training features, held out for model selection; fixed over runs.

    The fifth is random because many data sets are ordered by class: every fifth row could hold out whole classes.
    """
    return rng(0, "held", 0).permutation(count) % 5 == min(4, count - 1)


def top1(train: Pair, test: Pair, classes: int) -> float:
    """Fits a logistic regression on `train` and returns its accuracy in 0..1 on `test`, which is used once.

    Args:
      train, test: features float32 [n, D], standardized with the training moments, and labels int32 [n].
      classes: number of classes.
    """
    features, tests = standardize(train[0], test[0])
    return top1_as_they_are((features, train[1]), (tests, test[1]), classes)


def top1_as_they_are(train: Pair, test: Pair, classes: int) -> float:
    """Returns `top1` for features that are not standardized, where features of larger scale are penalized less.

    The penalty is chosen on a held-out fifth of the training features. Each fit starts from that of the next stronger
    penalty, the final fit from that of the chosen penalty.
    """
    features, labels = train
    held = every_fifth(len(labels))
    kept = (~held / (~held).sum()).astype(np.float32)
    path = [jnp.zeros((features.shape[1] + 1, classes))]
    for penalty in PENALTIES:
        path.append(fit(features, labels, kept, penalty, classes, path[-1]))
    scores = [accuracy(weights, features[held], labels[held]) for weights in path[1:]]
    best = len(scores) - 1 - int(np.argmax(scores[::-1]))  # the weakest penalty among ties
    everything = np.full(len(labels), 1 / len(labels), np.float32)
    weights = fit(features, labels, everything, PENALTIES[best], classes, path[1 + best])
    return accuracy(weights, *test)


@partial(jax.jit, static_argnames="classes")
def descend(features: jax.Array, labels: jax.Array, lrs: jax.Array, classes: int, seed: jax.Array | int) -> jax.Array:
    """Trains a linear layer by SGD at each of L learning rates, with the same initial weights and batches.

    Args:
      features: float32 [n, D].
      labels: int32 [n].
      lrs: float32 [L], per 256 examples.
      classes: number of classes.
      seed: seed of the initial weights and of the order of each epoch.

    Returns:
      float32 [L, D + 1, classes]; the last row of each is the bias.
    """
    count, width = features.shape
    batch = min(BATCH, -(-count // STEPS))
    steps = count // batch  # per epoch; the remainder of the order is dropped
    bias = jnp.zeros((1, classes))
    weights = DEVIATION * jax.random.normal(stream_key(seed, 0, "probe_init"), (width, classes))

    def loss(weights: jax.Array, rows: jax.Array) -> jax.Array:
        logits = features[rows] @ weights[:-1] + weights[-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def arm(lr: jax.Array) -> jax.Array:
        schedule = optax.cosine_decay_schedule(lr * batch / 256, EPOCHS * steps)
        optimizer = optax.sgd(schedule, momentum=MOMENTUM)

        def step(carry: tuple[jax.Array, optax.OptState], rows: jax.Array) -> tuple:
            weights, state = carry
            updates, state = optimizer.update(jax.grad(loss)(weights, rows), state)
            return (optax.apply_updates(weights, updates), state), None

        def epoch(carry: tuple[jax.Array, optax.OptState], number: jax.Array) -> tuple:
            order = jax.random.permutation(stream_key(seed, number, "probe_order"), count)
            return jax.lax.scan(step, carry, order[: steps * batch].reshape(steps, batch))

        start = jnp.concatenate([weights, bias])
        return jax.lax.scan(epoch, (start, optimizer.init(start)), jnp.arange(EPOCHS))[0][0]

    return jax.vmap(arm)(lrs)


def sweep(train: Pair, test: Pair, classes: int, validation: Pair | None = None, lrs: tuple[float, ...] = RATES,
          seed: int = 0) -> tuple[float, float]:
    """Trains the published probe at several learning rates.

    The learning rate is chosen on `validation` or, without one, on a held-out fifth of the training features. The layer
    is then trained again on all training features and tested once.

    Args:
      train, test, validation: features float32 [n, D], standardized with the training moments, and labels int32 [n].
      classes: number of classes.
      lrs: learning rates per 256 examples.
      seed: as for `descend`.

    Returns:
      (accuracy on `test` in 0..1, the chosen learning rate).
    """
    labels = train[1]
    features, tests = standardize(train[0], test[0])
    if validation is None:
        held = every_fifth(len(labels))
        fitted, judged = (features[~held], labels[~held]), (features[held], labels[held])
    else:
        fitted, judged = (features, labels), (standardize(train[0], validation[0])[1], validation[1])
    arms = descend(*fitted, np.array(lrs, np.float32), classes, seed)
    lr = lrs[int(np.argmax([accuracy(weights, *judged) for weights in arms]))]
    weights = descend(features, labels, np.array([lr], np.float32), classes, seed)[0]
    return accuracy(weights, tests, test[1]), lr
