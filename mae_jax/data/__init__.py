"""The input: pictures to batches of permuted uint8 patches. The only folder that imports TensorFlow, when built."""

import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.orders import Order
from mae_jax.errors import UserError

Batch = dict[str, np.ndarray]
FIELDS = ("patches", "order", "label", "id", "valid", "replaced")
BAD_NAMES = 100  # the last so many pictures that were replaced are kept by name
_PROVIDERS = {"cluster": "python -m mae_jax.cluster makes it"}

__all__ = ["Batch", "Inputs", "Order", "build"]


class Inputs(NamedTuple):
    """The input of a run, as one process sees it."""

    train: Callable[[int], Iterator[Batch]]  # step → endless: this process's rows of batches step, step + 1, ...
    support: Callable[[], Iterator[Batch]]  # of the training split, as the evaluation sees pictures; finite, padded
    evaluate: Callable[[], Iterator[Batch]]  # of the evaluation split likewise; empty without one
    num_train: int
    num_eval: int
    classes: tuple[str, ...]  # () without labels
    description: str  # one line
    bad: deque[str]  # 'name: reason' of the pictures that this process replaced, newest last


def build(config: ConfigDict, spec: dict[str, jax.ShapeDtypeStruct], order: Order,
          rows: np.ndarray | None = None) -> Inputs:
    """Opens the config's data.

    Batches are dicts of NumPy arrays with the fields of `spec`: `patches` uint8 [B, N, P], cut and permuted; `order`
    int32 [B, N], order[b, k] = raster index of the k-th patch; `label` int32 [B], -1 unlabelled; `id` int32 [B], -1 in
    padding; `valid` float32 [B], 0 for grey stand-ins and padding; `replaced` int32 [B], how many pictures failed
    before this one.

    Args:
      config: the resolved config.
      spec: field → global shape [B, ...] and dtype.
      order: how the method hides patches.
      rows: the global rows that this process feeds; None: all of them.

    Raises:
      UserError: the data is not there, or cannot give a field of the spec.
    """
    rows = np.arange(config.batch_size) if rows is None else np.asarray(rows)
    if config.data.source == "batches":
        from mae_jax.data import batches

        return Inputs(**batches.open_folder(config, spec, rows))
    for name in spec:
        if name not in FIELDS:
            raise UserError(f"data.source={config.data.source!r} gives no batch field {name!r}; "
                            f"{_PROVIDERS.get(name, 'it gives ' + ', '.join(FIELDS))}")
    return _random_access(config, spec, order, rows)


def _random_access(config: ConfigDict, spec: dict[str, jax.ShapeDtypeStruct], order: Order, rows: np.ndarray) -> Inputs:
    from mae_jax.data import pipeline, sources
    from mae_jax.data.views import Views

    data, views, bad = config.data, Views(config, order), deque(maxlen=BAD_NAMES)
    source = sources.load(data, data.train_split)
    held_out = sources.load(data, data.eval_split) if data.eval_split else None

    def train(step: int) -> Iterator[Batch]:
        example = functools.partial(pipeline.train_example, source, views, config.seed, bad)
        return pipeline.batches(example, spec, rows, range(step, sys.maxsize // config.batch_size), data)

    def evaluate(part: sources.Source | None) -> Iterator[Batch]:
        if part is None:
            return iter(())
        indices = pipeline.subset(part.size, config.eval.max_examples)
        example = functools.partial(pipeline.evaluate_example, part, views, indices, bad)
        return pipeline.batches(example, spec, rows, range(-(-len(indices) // config.batch_size)), data)

    return Inputs(
        train=train, support=lambda: evaluate(source), evaluate=lambda: evaluate(held_out), num_train=source.size,
        num_eval=held_out.size if held_out else 0, classes=source.classes, bad=bad,
        description=_describe(data, source.size, held_out.size if held_out else 0, len(source.classes)))


def _describe(data: ConfigDict, train: int, held_out: int, classes: int) -> str:
    where = data.name or data.path
    labels = f"{classes} classes" if classes else "no labels"
    return (f"{data.source}{f' {where}' if where else ''}: {train} pictures in {data.train_split}, "
            f"{held_out} in {data.eval_split or 'no evaluation split'}; {labels}")
