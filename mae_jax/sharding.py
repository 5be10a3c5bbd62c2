"""The mesh, where arrays live on it, and the way of a host batch to the devices."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mae_jax.errors import UserError


def make_mesh(config: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh with the axis `data`; raises UserError when devices or batch do not divide."""
    devices = jax.devices() if devices is None else devices
    size = len(devices) if config.mesh.data == -1 else config.mesh.data
    if size != len(devices):
        raise UserError(f"mesh.data={config.mesh.data}, but there are {len(devices)} devices; -1 takes them all")
    rows = config.batch_size // config.train.accumulate
    if rows % size:
        lower, upper = (config.train.accumulate * size * n for n in (rows // size, rows // size + 1))
        raise UserError(f"batch_size={config.batch_size} in {config.train.accumulate} micro-batches does not divide "
                        f"over {size} devices; nearest: {f'{lower} and ' if lower else ''}{upper}")
    return jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of the global batch over the data axis."""
    return NamedSharding(mesh, P("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, P())


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of the global batch that this process's devices hold, ascending, each once."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Makes global arrays [B, ...] of the rows that this process holds; the copy is asynchronous."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value, (batch_size, *value.shape[1:]))
            for name, value in batch.items()}


def with_sharding(tree: Any, sharding: NamedSharding) -> Any:
    """Returns the tree as ShapeDtypeStructs that carry `sharding`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
