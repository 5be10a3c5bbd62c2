"""Batches through a compiled program, and what comes out of it on the host while the devices go on."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mae_jax.runtime.sharding import replicated, to_devices

AHEAD = 1  # batches that the devices are at while the one before is taken from them


def outputs(program: Callable[..., Any], params: Any, extras: Any, batches: Iterable[dict[str, np.ndarray]],
            mesh: Mesh, size: int) -> Iterator[Any]:
    """Yields what a program makes of each batch, on the host, in order.

    Args:
      program: compiled: (params, extras, batch on the devices) → a tree of arrays that each process has whole.
      params, extras: of the method, on the devices.
      batches: this process's rows.
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
    """Returns a tree of host arrays, which all processes have alike, whole on every device."""
    def place(leaf: Any) -> jax.Array:
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, replicated(mesh), lambda index: value[index])

    return jax.tree.map(place, tree)
