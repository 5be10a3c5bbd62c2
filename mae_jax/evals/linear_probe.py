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

TOLERANCE = 1e-4  # a fit ends where its gradient is so small a part of that at zero weights (our choice),
ITERATIONS = 200  # or after so many iterations of L-BFGS: features of low rank settle slowly (our choice)
PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5)  # L2 strengths tried on a fifth of the training features (our choice)

# The published probe (MAE Table 10, whose caption says that SGD does as well as LARS): 90 epochs, momentum 0.9, no
# weight decay, weights from N(0, 0.01), cosine; without warm-up or augmentation, as features are computed once.
EPOCHS = 90
MOMENTUM = 0.9
DEVIATION = 0.01
BATCH = 4096  # at most, as in that caption; a small set makes STEPS steps of an epoch (our choice)
STEPS = 16
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # per 256 examples, as optim.lr (our choice)


class LinearProbe(Probe):
    """Top-1 of the held-out images by a logistic regression that is fitted on the training split."""

    name, metric = "linear_probe", "linear/top1"

    def accuracy(self, train: Pair, test: Pair, classes: int, c: ConfigDict) -> float:
        return top1(train, test, classes)


@partial(jax.jit, static_argnames="classes")
def fit(features: jax.Array, labels: jax.Array, share: jax.Array, penalty: jax.Array, classes: int,
        start: jax.Array | None = None) -> jax.Array:
    """Minimises Σ share · cross-entropy + penalty · |W|².

    Args:
      features: float32 [n, D].
      labels: int32 [n].
      share: float32 [n], the weight of each example, summing to 1.
      penalty: L2 strength; the bias is free.
      classes: number of classes.
      start: float32 [D + 1, classes], where to begin, such as the fit of a stronger penalty; None: at zero.

    Returns:
      float32 [D + 1, classes]; the last row is the bias.
    """
    inputs = jnp.concatenate([features, jnp.ones((features.shape[0], 1))], 1)
    zero = jnp.zeros((inputs.shape[1], classes))
    start = zero if start is None else start

    def loss(weights: jax.Array) -> jax.Array:
        # In bfloat16, the default of TPUs, the line search would not see its last steps.
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
        # The line search leaves the gradient of where it ended.
        return optax.apply_updates(weights, updates), state, turn + 1, jnp.linalg.norm(optax.tree.get(state, "grad"))

    return jax.lax.while_loop(unsettled, iterate, (start, optimizer.init(start), jnp.int32(0), jnp.float32(jnp.inf)))[0]


def accuracy(weights: jax.Array, features: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of features [n, D] whose best class is their label."""
    logits = np.asarray(features @ np.asarray(weights[:-1]) + np.asarray(weights[-1]))
    return float((logits.argmax(1) == labels).mean())


def standardize(features: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Scales features [n, D], and others by the same, as the affine-free batch norm of MAE's probe does (A.1)."""
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    return [(x - mean) / deviation for x in (features, *others)]


def every_fifth(count: int) -> np.ndarray:
    """Returns which of the training features are held out to choose by, bool [count]: a fifth, the same in every run.

    Drawn, for in many data sets the classes take turns, and every fifth row would then hold out whole classes.
    """
    return rng(0, "held", 0).permutation(count) % 5 == min(4, count - 1)


def top1(train: Pair, test: Pair, classes: int) -> float:
    """Fits a logistic regression and returns the accuracy on the test pair, which is read once.

    Features are standardised by the training ones.
    """
    features, tests = standardize(train[0], test[0])
    return top1_as_they_are((features, train[1]), (tests, test[1]), classes)


def top1_as_they_are(train: Pair, test: Pair, classes: int) -> float:
    """Returns what `top1` does, of features that are not standardised: the larger ones are penalised less.

    The penalty is chosen on every fifth of the training features, held out. Each fit begins where that of the next
    stronger penalty ended, the last one where that of the chosen penalty did.
    """
    features, labels = train
    held = every_fifth(len(labels))
    kept = (~held / (~held).sum()).astype(np.float32)
    path = [jnp.zeros((features.shape[1] + 1, classes))]
    for penalty in PENALTIES:
        path.append(fit(features, labels, kept, penalty, classes, path[-1]))
    scores = [accuracy(weights, features[held], labels[held]) for weights in path[1:]]
    best = len(scores) - 1 - int(np.argmax(scores[::-1]))  # of equal ones the weakest penalty
    everything = np.full(len(labels), 1 / len(labels), np.float32)
    weights = fit(features, labels, everything, PENALTIES[best], classes, path[1 + best])
    return accuracy(weights, *test)


@partial(jax.jit, static_argnames="classes")
def descend(features: jax.Array, labels: jax.Array, lrs: jax.Array, classes: int, seed: jax.Array | int) -> jax.Array:
    """Trains a linear layer by SGD at each of L learning rates: the same first weights, the same batches.

    Args:
      features: float32 [n, D].
      labels: int32 [n].
      lrs: float32 [L], per 256 examples.
      classes: number of classes.
      seed: of the weights and of the order of each epoch.

    Returns:
      float32 [L, D + 1, classes]; the last row of each is the bias.
    """
    count, width = features.shape
    batch = min(BATCH, -(-count // STEPS))
    steps = count // batch  # of an epoch; the rest of its order is left out
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
    """Trains the published probe at several learning rates and returns (accuracy on the test pair, the rate chosen).

    Features are standardised by the training ones. The rate is chosen on the validation pair or, without one, on every
    fifth training feature; the layer is then trained anew on all training features, and the test pair read once.
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
