"""The input: pictures to batches of permuted uint8 patches. The only folder that imports TensorFlow, when built."""

import functools
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

        return Inputs(**batches.open_folder(config, spec, order, rows))
    for name in spec:
        if name not in FIELDS:
            raise UserError(f"data.source={config.data.source!r} gives no batch field {name!r}; "
                            f"{_PROVIDERS.get(name, 'it gives ' + ', '.join(FIELDS))}")
    return _open(config, spec, order, rows)


def _open(config: ConfigDict, spec: dict[str, jax.ShapeDtypeStruct], order: Order, rows: np.ndarray) -> Inputs:
    from mae_jax.data import pipeline, sources, streams
    from mae_jax.data.views import Views

    data = config.data
    source = sources.load(data, data.train_split)
    held_out = sources.load(data, data.eval_split) if data.eval_split else None
    kinds = {sources.Source: pipeline, streams.Stream: streams}
    bad: deque[str] = deque(maxlen=BAD_NAMES)
    common = {"views": Views(config, order), "config": config, "spec": spec, "rows": rows, "bad": bad}

    def evaluate(part: sources.Source | streams.Stream | None) -> Iterator[Batch]:
        return kinds[type(part)].evaluate(part, **common) if part else iter(())

    left_over = streams.left_over(source, config) if isinstance(source, streams.Stream) else range(0)
    lost = ""
    if left_over:
        lost = f"; left out by {data.readers} readers: {len(left_over)}, from {source.name(left_over[0])}"
    num_eval = held_out.size if held_out else 0
    return Inputs(
        train=functools.partial(kinds[type(source)].train, source, **common),
        support=functools.partial(evaluate, source), evaluate=functools.partial(evaluate, held_out),
        num_train=source.size - len(left_over), num_eval=num_eval, classes=source.classes, bad=bad,
        description=_describe(data, source.size, num_eval, len(source.classes)) + lost)


def _describe(data: ConfigDict, train: int, held_out: int, classes: int) -> str:
    where = data.name or data.path
    labels = f"{classes} classes" if classes else "no labels"
    return (f"{data.source}{f' {where}' if where else ''}: {train} pictures in {data.train_split}, "
            f"{held_out} in {data.eval_split or 'no evaluation split'}; {labels}")
