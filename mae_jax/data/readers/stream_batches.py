"""Turns the items of a tf.data stream into batches of examples that Python makes, in order."""

import atexit
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data import tensorflow_cpu
from mae_jax.data.readers import random_access
from mae_jax.data.readers.makers import MOST_AT_ONCE, Batch
from mae_jax.data.tensorflow_cpu import tf
from mae_jax.data.transforms.example import Fields, Spec

Item = tuple[int | bytes | np.ndarray, ...]


def one_by_one(items: tf.data.Dataset, example: Callable[..., Fields], spec: Spec, size: int,
               data: ConfigDict) -> Iterator[Batch]:
    """Yields batches of `size` examples, in the order of the items, made ahead by data.threads threads.

    Args:
      items: data set of int64 or string scalars and of arrays, or of tuples of them.
      example: an item's values as int, bytes and arrays → fields; called from many threads.
    """
    def call(*values: Any) -> list[np.ndarray]:
        fields = example(*_plain(values))
        return [np.asarray(fields[name], struct.dtype) for name, struct in spec.items()]

    return _run(items, call, [struct.shape[1:] for struct in spec.values()], spec, size, data)


def together(items: tf.data.Dataset, examples: Callable[[list[Item]], list[Fields]], spec: Spec, size: int,
             data: ConfigDict) -> Iterator[Batch]:
    """As `one_by_one`, with one call for several items of a batch.

    Args:
      examples: items → the fields of each; called from many threads.
    """
    at_once = max(count for count in range(1, MOST_AT_ONCE + 1) if size % count == 0)

    def call(*values: Any) -> list[np.ndarray]:
        made = examples([_plain(item) for item in zip(*values, strict=True)])
        return [np.stack([np.asarray(fields[name], struct.dtype) for fields in made])
                for name, struct in spec.items()]

    shapes = [(at_once, *struct.shape[1:]) for struct in spec.values()]
    for batch in _run(items.batch(at_once, drop_remainder=True), call, shapes, spec, size // at_once, data):
        yield {name: value.reshape(size, *value.shape[2:]) for name, value in batch.items()}


def _plain(values: Any) -> Item:
    return tuple(value if isinstance(value, bytes) or value.ndim else int(value) for value in values)


def _run(items: tf.data.Dataset, make: Callable[..., list[np.ndarray]], shapes: list[tuple[int, ...]], spec: Spec,
         size: int, data: ConfigDict) -> Iterator[Batch]:
    """Yields batches of `size` results of `make`, which have these shapes and the dtypes of the spec."""
    failures: list[Exception] = []

    def call(*values: Any) -> list[np.ndarray]:
        try:
            return make(*values)
        except Exception as error:  # raised in TensorFlow's thread, it would be replaced by an error of TensorFlow
            failures.append(error)
            return [np.zeros(shape, struct.dtype) for shape, struct in zip(shapes, spec.values(), strict=True)]

    def fields_of(*item: tf.Tensor) -> dict[str, tf.Tensor]:
        values = tf.numpy_function(call, item, [tf.as_dtype(struct.dtype) for struct in spec.values()])
        for value, shape in zip(values, shapes, strict=True):
            value.set_shape(shape)
        return dict(zip(spec, values, strict=True))

    workers = random_access.threads(data)
    dataset = items.map(fields_of, num_parallel_calls=workers, deterministic=True)
    dataset = dataset.batch(size, drop_remainder=True).prefetch(data.prefetch)
    dataset = dataset.with_options(tensorflow_cpu.options(workers))
    batches = _iterate(dataset, failures)
    _running.add(batches)
    return batches


def _iterate(dataset: tf.data.Dataset, failures: list[Exception]) -> Iterator[Batch]:
    """Yields NumPy batches until the end or the first failure."""
    for batch in dataset.as_numpy_iterator():
        if failures:
            raise failures[0]
        yield batch


_running: weakref.WeakSet[Iterator[Batch]] = weakref.WeakSet()


@atexit.register
def _stop() -> None:
    """Closes open iterators: TensorFlow's threads call Python, and would hang the process once Python has shut down."""
    for batches in list(_running):
        batches.close()
