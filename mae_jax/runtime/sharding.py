"""The mesh, where arrays live on it, and the way of a host batch to the devices.

`config.mesh` has the axes `data` (devices share the rows of a batch), `fsdp` (they also cut every parameter, which is
gathered where it is used) and `tensor` (they share heads and hidden units). ZeRO (arXiv 1910.02054) cuts parameters,
optimizer and averages over `data` as well; in the mesh itself, that axis is then called `zero`. Each gradient is
scattered to where its piece of the optimizer lives as it is summed, and each parameter is gathered once a step.
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
# Path → the dimension that `tensor` cuts: hidden units and heads (Megatron-LM, section 3, arXiv 1909.08053). The kernel
# of q, k and v is whole along `tensor`: its columns are three matrices side by side, and cutting them would not cut
# heads.
TENSOR_RULES = ((r"block_\d+/mlp/fc1/(kernel|bias)$", "out"), (r"block_\d+/(attn/proj|mlp/fc2)/kernel$", "in"))
# Kind of device or platform → who adds up first where a reduction over all devices has two stages: the second sends
# pieces alone. One stage over the whole torus would be best, but there libtpu (0.0.52) makes an all-reduce of a
# reduce-scatter, which sends twice as much: on v5e and v6e from 16 chips on, on v4 from 8.
# - cores: the two of a chip, whose exchange needs no link.
# - half: half of the slice, a box, over nearly all links of the torus. Pairs of neighbors first would send half of all
#   bytes over one link of each chip. By the planner this takes 0.72 (v5e:4x4), 0.77 (v6e:4x4) times as long as one
#   stage does, and 0.60 and 0.56 times as long as pairs first; on 8 chips 1.2 to 1.5 times as long as one stage.
# - all: in one stage, since NCCL does as it is told.
STAGES = {"TPU v2": "cores", "TPU v3": "cores", "TPU7x": "cores", "tpu": "half", "gpu": "all", "cpu": "cores"}
FEWEST = {"cores": 4, "half": 16, "all": math.inf}  # devices from which on there are two stages


def make_mesh(config: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh that `config.mesh` of a config without 'auto' describes over all devices, or those given.

    Several slices are the outermost part of `data`; all other axes lie inside a slice. With ZeRO, `data` is then the
    slices alone: a gradient is scattered over the devices of a slice, and its pieces are summed over the slices.

    Raises:
      UserError: the axes do not multiply to the number of devices, do not fit the slices, the batch does not divide, or
        gradients would be summed in less than activations have.
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
        raise UserError(f"mesh.data={data} does not divide over {len(slices)} slices, which share rows alone; lower "
                        "mesh.fsdp or mesh.tensor, which lie inside a slice")
    data //= len(slices)
    data, zero = (1, data) if config.mesh.zero == "on" else (data, 1)
    grids = [_slice_mesh((data, zero, fsdp, tensor), part) for part in slices]
    return Mesh(np.concatenate(grids), AXES, axis_types=(AxisType.Auto,) * 4)


def _slices(config: ConfigDict, devices: list[jax.Device]) -> list[list[jax.Device]]:
    """Returns the devices of each slice, in the order of the slices; raises UserError where mesh.slices does not fit.

    TPUs say which slice they are in. Others are parted in their order, which is by process.
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
    """Returns the devices of one slice as an array of the sizes of AXES, or with the axis that cuts parameters in two.

    Where all rows are along one axis that cuts parameters, `zero` and `fsdp` are the two stages of its reductions.
    """
    data, zero, fsdp, tensor = sizes
    rows, first = zero * fsdp, STAGES.get(devices[0].device_kind) or STAGES[devices[0].platform]
    place = partial(mesh_utils.create_device_mesh, devices=devices, allow_split_physical_axes=True)
    if data > 1 or rows not in (zero, fsdp) or rows < FEWEST[first] or rows % 2:
        return place(sizes)
    # The last axes are placed first, the closest together.
    return place((1, rows // 2, 2, tensor) if first == "cores" else (1, 2, rows // 2, tensor)).swapaxes(1, 2)


def mesh_sizes(config: ConfigDict, devices: int) -> list[int]:
    """Returns the sizes of data, fsdp and tensor, -1 resolved; raises UserError when they are not `devices`."""
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
    """Rows of the global batch over all axes but `tensor`, along which devices hold the same rows."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, P())


def param_sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Returns where the parameter of a path lives, and whatever has its path behind a prefix: moments, averages."""
    split = next((split for pattern, split in TENSOR_RULES if re.search(pattern, name)), "")
    return NamedSharding(mesh, kernel_spec(shape, split, mesh.shape))


def param_shardings(mesh: Mesh, shapes: Any) -> Any:
    """Returns the tree of `param_sharding` for a tree of shapes: parameters, or a whole train state."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: param_sharding(mesh, path(keys), leaf.shape), shapes)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of the global batch that this process's devices hold, ascending, each once."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Makes global arrays [B, ...] of `local_rows` of a batch, which is what this process holds."""
    sharding, rows = batch_sharding(mesh), local_rows(mesh, batch_size)

    def place(value: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # JAX gives none for a scalar
            # The rows of a device are contiguous in the batch, and so they are among this process's ascending rows.
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return value[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *value.shape[1:]), sharding, part)

    return {name: place(value) for name, value in batch.items()}


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Returns the tree of shapes as ShapeDtypeStructs that carry their sharding; one sharding may stand for a tree."""
    def join(sharding: NamedSharding, part: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part)

    return jax.tree.map(join, shardings, shapes)
