"""The mesh, the shardings of arrays, and the transfer of a host batch to the devices.

`config.mesh` has the axes `data` (shards the rows of a batch), `fsdp` (shards rows and parameters; a parameter is
gathered where it is used) and `tensor` (shards heads and hidden units). With ZeRO (arXiv 1910.02054), `data` also
shards parameters, optimizer state and moving averages, and is called `zero` in the mesh. Gradients are then
reduce-scattered to the shards of the optimizer state, and parameters are gathered once per step.
"""

import math
import re
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mae_jax.errors import UserError
from mae_jax.ops.partitioning import ROWS, kernel_spec
from mae_jax.param_tree import path

AXES = ("data", "zero", "fsdp", "tensor")
# Regex of paths → the dimension that `tensor` shards: hidden units and heads (Megatron-LM, arXiv 1909.08053, section
# 3). The kernel of q, k and v is not sharded along `tensor`: its columns are three matrices side by side, so that its
# shards would not be whole heads.
TENSOR_RULES = ((r"block_\d+/mlp/fc1/(kernel|bias)$", "out"), (r"block_\d+/(attn/proj|mlp/fc2)/kernel$", "in"))
# Kind of device, or platform → the group that reduces first, if reductions over all devices have two stages. The second
# stage sends shards only. One stage over the whole torus would be best, but libtpu (0.0.52) turns such a reduce-scatter
# into an all-reduce, which sends twice as much: on v5e and v6e with 16 or more chips, on v4 with 8 or more.
# - cores: the two cores of a chip, whose exchange needs no link.
# - half: half of the slice, a box, over nearly all links of the torus. Pairs of neighbors first would send half of all
#   bytes over one link of each chip. By the planner's estimates, halves first take 0.72 (v5e:4x4) and 0.77 (v6e:4x4)
#   times as long as one stage, and 0.60 and 0.56 times as long as pairs first; on 8 chips, 1.2 to 1.5 times as long as
#   one stage.
# - all: one stage, since NCCL keeps the reduce-scatter.
STAGES = {"TPU v2": "cores", "TPU v3": "cores", "TPU7x": "cores", "tpu": "half", "gpu": "all", "cpu": "cores"}
FEWEST = {"cores": 4, "half": 16, "all": math.inf}  # least number of devices for two stages


def make_mesh(config: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the mesh of `config.mesh`, whose 'auto' values must be resolved.

    With several slices, `data` runs over the slices first; all other axes lie inside a slice. With ZeRO, `data` runs
    over the slices only: gradients are scattered within a slice, and their shards are summed over the slices.

    Args:
      config: the config.
      devices: the devices to use; None: all.

    Raises:
      UserError: the axes do not multiply to the number of devices or do not fit the slices, the batch size is not
        divisible, or gradients would be summed with less precision than activations have.
    """
    devices = jax.devices() if devices is None else devices
    data, fsdp, tensor = mesh_sizes(config, len(devices))
    _check_batch(config, data * fsdp)
    assert config.mesh.zero != "auto", "config.for_platform comes first"
    if config.mesh.reduce == "bfloat16" and config.model.dtype != "bfloat16":
        raise UserError(f"mesh.reduce=bfloat16 with activations in {config.model.dtype} would round the parameters; "
                        "use model.dtype=bfloat16 or mesh.reduce=float32")
    slices = _slices(config, devices)
    if data % len(slices):
        raise UserError(f"mesh.data={data} does not divide over {len(slices)} slices, which only shard rows; lower "
                        "mesh.fsdp or mesh.tensor, which lie inside a slice")
    data //= len(slices)
    data, zero = (1, data) if config.mesh.zero == "on" else (data, 1)
    grids = [_slice_mesh((data, zero, fsdp, tensor), part) for part in slices]
    return Mesh(np.concatenate(grids), AXES, axis_types=(AxisType.Auto,) * 4)


def _slices(config: ConfigDict, devices: list[jax.Device]) -> list[list[jax.Device]]:
    """Returns the devices of each slice, in the order of slices; raises UserError if mesh.slices does not fit.

    TPU devices have a slice index. Other devices are split in their order, which is by process.
    """
    count = config.mesh.slices
    if count < 1 and count != -1:
        raise UserError(f"mesh.slices={count}; expected how many slices there are, or -1 to find out")
    if devices[0].platform == "tpu":
        known: dict[int, list[jax.Device]] = {}
        for device in devices:
            known.setdefault(getattr(device, "slice_index", 0), []).append(device)
        if count not in (-1, len(known)):
            raise UserError(f"mesh.slices={count}, but the devices are in {len(known)} "
                            f"slice{'s' if len(known) > 1 else ''}; write that, or -1")
        return [known[index] for index in sorted(known)]
    size, rest = divmod(len(devices), max(count, 1))
    if rest:
        raise UserError(f"mesh.slices={count} does not divide {len(devices)} device{'s' if len(devices) > 1 else ''}")
    return [devices[start : start + size] for start in range(0, len(devices), size)]


def _slice_mesh(sizes: tuple[int, int, int, int], devices: list[jax.Device]) -> np.ndarray:
    """Returns the devices of one slice as an array with the axes AXES.

    If either `zero` or `fsdp` alone shards the rows, the two axes become the two stages of its reductions.
    """
    data, zero, fsdp, tensor = sizes
    rows, first = zero * fsdp, STAGES.get(devices[0].device_kind) or STAGES[devices[0].platform]
    place = partial(mesh_utils.create_device_mesh, devices=devices, allow_split_physical_axes=True)
    if data > 1 or rows not in (zero, fsdp) or rows < FEWEST[first] or rows % 2:
        return place(sizes)
    # create_device_mesh gives the last axes the nearest neighbors.
    return place((1, rows // 2, 2, tensor) if first == "cores" else (1, 2, rows // 2, tensor)).swapaxes(1, 2)


def mesh_sizes(config: ConfigDict, devices: int) -> list[int]:
    """Returns the sizes of data, fsdp and tensor with -1 resolved; raises UserError if their product is not `devices`.
    """
    sizes = [config.mesh[axis] for axis in ("data", "fsdp", "tensor")]
    text = f"mesh.data={sizes[0]}, mesh.fsdp={sizes[1]}, mesh.tensor={sizes[2]}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{text}; expected numbers of devices, at most one of them -1 for the rest")
    sizes = [devices // -int(np.prod(sizes)) if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != devices:
        raise UserError(f"{text} does not multiply to {devices} device{'s' if devices > 1 else ''}; one axis may be "
                        "-1, which takes the rest")
    return sizes


def _check_batch(config: ConfigDict, parts: int) -> None:
    rows = config.batch_size // config.train.accumulate
    if rows % parts:
        lower, upper = (config.train.accumulate * parts * n for n in (rows // parts, rows // parts + 1))
        raise UserError(f"batch_size={config.batch_size} in {config.train.accumulate} micro-batches does not divide "
                        f"over {parts} devices; nearest: {f'{lower} and ' if lower else ''}{upper}")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch's rows, over all axes but `tensor`."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def param_sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of a parameter by its path, or of an array whose path ends with it: moments, averages."""
    split = next((split for pattern, split in TENSOR_RULES if re.search(pattern, name)), "")
    return NamedSharding(mesh, kernel_spec(shape, split, mesh.shape))


def param_shardings(mesh: Mesh, shapes: Any) -> Any:
    """Returns the tree of `param_sharding` for a tree of shapes: of parameters, or of a whole train state."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: param_sharding(mesh, path(keys), leaf.shape), shapes)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the indices of the global batch's rows that this process's devices hold, int [b], ascending and unique.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Puts a batch on the devices, as global arrays [B, ...].

    Args:
      batch: the rows `local_rows` of the batch, host arrays [b, ...].
      mesh: the mesh.
      batch_size: B.
    """
    sharding, rows = batch_sharding(mesh), local_rows(mesh, batch_size)

    def place(value: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # None is for scalars only
            # A device's rows are contiguous in the batch, and therefore among this process's rows, which ascend.
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return value[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *value.shape[1:]), sharding, part)

    return {name: place(value) for name, value in batch.items()}


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Returns a tree of shapes as ShapeDtypeStructs with shardings; one sharding may apply to a whole subtree."""
    def join(sharding: NamedSharding, part: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part)

    return jax.tree.map(join, shardings, shapes)
