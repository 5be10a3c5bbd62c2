"""Sharding of arrays inside operations. Without a mesh, every function here is the identity.

The mesh is that of the surrounding `jax.set_mesh`; `mae_jax.runtime.sharding` describes its axes.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

ROWS = ("data", "zero", "fsdp")  # mesh axes that shard the rows of a batch
CUTS = ("zero", "fsdp")  # mesh axes that shard parameters, from the largest pieces to the smallest
SMALL = 2**14  # parameters with fewer values are replicated (our choice): sharding would cost more than it saves

# Device kinds of GPUs without the kernels of cuDNN and Triton: compute capability below 8.0, or not by NVIDIA.
OLDER = re.compile(r"NVIDIA (GeForce (GTX|RTX 20)|TITAN|Quadro)|(?!NVIDIA )")


def sizes() -> dict[str, int]:
    """Returns axis → size of the surrounding mesh; {} without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def device() -> jax.sharding.AbstractDevice | None:
    """Returns platform and kind of the surrounding mesh's devices; None without a mesh, or if devices differ."""
    return jax.sharding.get_abstract_mesh().abstract_device


def platform() -> str:
    """Returns the platform of the surrounding mesh's devices, 'cpu', 'gpu' or 'tpu'; '' if `device` returns None."""
    kind = device()
    return kind.platform if kind else ""


def row_shares() -> int:
    """Returns the number of shards of a batch's rows."""
    mesh = sizes()
    return _pieces(ROWS, mesh) if mesh else 1


def on_each_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Wraps a function with `jax.shard_map`, so that each device applies it to its own shards of the arguments."""
    mesh = sizes()
    if not mesh or max(mesh.values()) == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Constrains the sharding of x; `axes` has one entry per leading dimension: a mesh axis, a tuple of axes or None.
    """
    return jax.lax.with_sharding_constraint(x, P(*axes)) if sizes() else x


def kernel_spec(shape: tuple[int, ...], split: str, mesh: Mapping[str, int]) -> P:
    """Returns how a parameter of this shape is sharded between its uses.

    The axis `tensor` shards the first dimension (`split` 'in'), the last ('out') or none (''). The axes of CUTS then
    shard the first dimension that they divide evenly. They do not shard parameters of fewer than SMALL values.
    """
    parts: list[tuple[str, ...]] = [()] * len(shape)
    if split and mesh["tensor"] > 1 and shape[_dimension(split)] % mesh["tensor"] == 0:
        parts[_dimension(split)] = ("tensor",)
    cuts = tuple(axis for axis in CUTS if mesh[axis] > 1)
    if cuts and np.prod(shape) >= SMALL:
        fits = [d for d, size in enumerate(shape) if size % _pieces((*parts[d], *cuts), mesh) == 0]
        if fits:
            parts[fits[0]] += cuts
    return P(*parts)


def gather(kernel: jax.Array, split: str) -> jax.Array:
    """All-gathers a parameter over the axes of CUTS, one axis after the other, the smallest pieces first.

    It gathers one axis at a time because libtpu 0.0.52 turns an all-gather over several axes into an all-reduce.
    """
    mesh = sizes()
    if not mesh:
        return kernel
    spec = kernel_spec(kernel.shape, split, mesh)
    kernel = constrain(kernel, *spec)
    for axis in reversed(CUTS):
        if axis in axes_of(spec):
            spec = P(*[tuple(name for name in _names(part) if name != axis) for part in spec])
            kernel = constrain(kernel, *spec)
    return kernel


def sum_to(partial: jax.Array, spec: P) -> jax.Array:
    """Sums the devices' partial gradients of a parameter, inside `shard_map`; each device keeps its shard of `spec`.

    It reduce-scatters over the axes that shard the parameter, the largest pieces first, then all-reduces over the other
    axes of ROWS.
    """
    mesh = sizes()
    for dimension, part in enumerate(spec):
        for axis in _names(part):
            if axis in CUTS:
                partial = jax.lax.psum_scatter(partial, axis, scatter_dimension=dimension, tiled=True)
    rest = tuple(axis for axis in ROWS if axis not in axes_of(spec) and mesh[axis] > 1)
    return jax.lax.psum(partial, rest) if rest else partial


def axes_of(spec: P) -> tuple[str, ...]:
    """Returns the names of all mesh axes in a spec."""
    return tuple(name for part in spec for name in _names(part))


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part or ())


def _pieces(axes: tuple[str, ...], mesh: Mapping[str, int]) -> int:
    return int(np.prod([mesh[axis] for axis in axes]))


def _dimension(split: str) -> int:
    return {"in": 0, "out": -1}[split]
