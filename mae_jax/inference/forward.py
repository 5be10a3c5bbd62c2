"""Runs batches through a compiled program, with transfers to the host while the devices compute."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mae_jax.runtime.sharding import replicated, to_devices

AHEAD = 1  # batches in flight while an earlier one is transferred to the host


def outputs(program: Callable[..., Any], params: Any, extras: Any, batches: Iterable[dict[str, np.ndarray]],
            mesh: Mesh, size: int) -> Iterator[Any]:
    """Yields the outputs of a program for each batch, as host arrays, in order.

    Args:
      program: compiled function (params, extras, batch on the devices) → tree of replicated arrays.
      params, extras: of the method, on the devices.
      batches: this process's rows of each batch.
      mesh: the devices.
      size: B, the rows of a global batch.
    """
    waiting: deque[Any] = deque()
    for batch in batches:
        waiting.append(program(params, extras, to_devices(batch, mesh, size)))
        if len(waiting) > AHEAD:
            yield jax.device_get(waiting.popleft())
    while waiting:
        yield jax.device_get(waiting.popleft())


def placed(tree: Any, mesh: Mesh) -> Any:
    """Replicates a tree of host arrays, which are equal on all processes, to every device."""
    def place(leaf: Any) -> jax.Array:
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, replicated(mesh), lambda index: value[index])

    return jax.tree.map(place, tree)
