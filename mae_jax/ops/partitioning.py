"""How arrays lie on the mesh: what operations must know of it, and nothing more. Without a mesh, all is the identity.

The mesh is the one of the surrounding `jax.set_mesh`. Its axes and their roles are described in
`mae_jax.runtime.sharding`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

ROWS = ("data", "zero", "fsdp")  # the axes that share the rows of a batch
CUTS = ("zero", "fsdp")  # the axes that cut parameters, the first one into the largest pieces
SMALL = 2**14  # values of a parameter below which a cut saves less than its messages cost (our choice)

# Names of GPUs with a compute capability below 8.0, or of another maker, for which cuDNN and Triton have no kernels.
OLDER = re.compile(r"NVIDIA (GeForce (GTX|RTX 20)|TITAN|Quadro)|(?!NVIDIA )")


def sizes() -> dict[str, int]:
    """Returns axis → size of the surrounding mesh; {} without one."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def device() -> jax.sharding.AbstractDevice | None:
    """Returns platform and kind of the surrounding mesh's devices; None without a mesh, or where they differ."""
    return jax.sharding.get_abstract_mesh().abstract_device


def platform() -> str:
    """Returns what the devices of the surrounding mesh are, 'cpu', 'gpu' or 'tpu'; '' where `device` returns None."""
    kind = device()
    return kind.platform if kind else ""


def row_shares() -> int:
    """Returns among how many groups of devices the rows of a batch are shared."""
    mesh = sizes()
    return _pieces(ROWS, mesh) if mesh else 1


def on_each_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns the function, applied by each device to its own part of the arguments."""
    mesh = sizes()
    if not mesh or max(mesh.values()) == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Lays x out on the mesh, one entry per leading dimension: an axis, a tuple of axes or None."""
    return jax.lax.with_sharding_constraint(x, P(*axes)) if sizes() else x


def kernel_spec(shape: tuple[int, ...], split: str, mesh: Mapping[str, int]) -> P:
    """Returns where a parameter lies at rest.

    `tensor` cuts the first dimension ('in'), the last ('out') or none (''). The axes of CUTS then cut the first
    dimension that they divide evenly; small parameters are whole everywhere.
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
    """Collects a parameter from the devices that hold its pieces, one axis after the other, the smallest pieces first.

    One axis at a time because TPUs (libtpu 0.0.52) turn an all-gather over all devices at once into an all-reduce.
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
    """Adds up what the devices hold of a parameter's gradient, inside shard_map: each keeps the piece of `spec`.

    Reduce-scatters over the axes that cut it, the largest pieces first, then all-reduces over the other axes of rows.
    """
    mesh = sizes()
    for dimension, part in enumerate(spec):
        for axis in _names(part):
            if axis in CUTS:
                partial = jax.lax.psum_scatter(partial, axis, scatter_dimension=dimension, tiled=True)
    rest = tuple(axis for axis in ROWS if axis not in axes_of(spec) and mesh[axis] > 1)
    return jax.lax.psum(partial, rest) if rest else partial


def axes_of(spec: P) -> tuple[str, ...]:
    """Returns the names of all axes in a spec."""
    return tuple(name for part in spec for name in _names(part))


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part or ())


def _pieces(axes: tuple[str, ...], mesh: Mapping[str, int]) -> int:
    return int(np.prod([mesh[axis] for axis in axes]))


def _dimension(split: str) -> int:
    return {"in": 0, "out": -1}[split]
