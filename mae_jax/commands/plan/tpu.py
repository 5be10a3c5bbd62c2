"""TPU topologies for ahead-of-time compilation: properties of the chips, the links between them, libtpu's devices.

libtpu describes any slice on a machine without TPUs, and compiles for it. A topology is named as in libtpu, by the
chips along each dimension ('v3:8x8'), or by Cloud TPU's accelerator type ('v5litepod-8', shapes in tpu_types.csv). A
device is a JAX device: a core on v2, v3 and 7x, a chip on the others.
"""

import contextlib
import csv
import functools
import importlib.util
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mae_jax.errors import UserError, did_you_mean
from mae_jax.runtime import progress

GIB = 2**30


class Chip(NamedTuple):
    """One generation of TPUs. Its peak in FLOP/s is in mae_jax.training.throughput.PEAKS.

    Attributes:
      hbm: bytes of memory per device.
      hbm_rate: memory bandwidth per device, in bytes per second.
      link_rate: bytes per second over one link, one way; a chip has two links per dimension.
      dimensions: number of dimensions of the torus.
      ring: a dimension whose size is a multiple of this, and above 2, is closed to a ring; the others are lines.
      network_rate: bytes per second and chip between slices, over the network cards of the host.
      most: number of chips in the largest pod.
      name: libtpu's name.
      options: further options of libtpu's topology description.
    """

    hbm: float
    hbm_rate: float
    link_rate: float
    dimensions: int
    ring: int
    network_rate: float
    most: int
    name: str
    options: dict[str, str] = {}


# HBM and its rate per chip: cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x}; half of it where a chip has two
# devices. Link rates: "How to Scale Your Model" (jax-ml/scaling-book, tpus.md); v2: 496 Gbit/s, recalled from "A
# Domain Specific Supercomputer for Training Deep Neural Networks" (CACM 2020), which gives v3 656 Gbit/s, a fifth less
# than the figure here; 7x: 1200 GB/s both ways over six links, docs/tpu7x. Rings: scaling-book for v4 (multiples of 4)
# and v5e, v6e (16); v5p and 7x as v4. That every dimension of a v2 or v3 slice is a ring is an assumption: a slice that
# is a part of a pod may lack the links that close it.
CHIPS = {
    "v2": Chip(8 * GIB, 300e9, 62e9, 2, 1, 6.25e9, 256, "v2"),
    "v3": Chip(16 * GIB, 450e9, 100e9, 2, 1, 6.25e9, 1024, "v3"),
    "v4": Chip(32 * GIB, 1200e9, 45e9, 3, 4, 6.25e9, 4096, "v4", {"chip_config_name": "megacore"}),
    "v5e": Chip(16 * GIB, 819e9, 50e9, 2, 16, 3.125e9, 256, "v5e"),
    "v5p": Chip(95 * GIB, 2765e9, 100e9, 3, 4, 6.25e9, 8960, "v5p"),
    "v6e": Chip(32 * GIB, 1638e9, 100e9, 2, 16, 12.5e9, 256, "v6e"),
    "7x": Chip(96 * GIB, 3690e9, 100e9, 3, 4, 12.5e9, 9216, "tpu7x"),
}
# Accepted names of a generation → its key in CHIPS.
GENERATIONS = {**{name: name for name in CHIPS}, "tpu7x": "7x", "v7x": "7x", "v5litepod": "v5e"}
EXAMPLES = {2: "8x8", 3: "4x4x4"}
ATTEMPTS = 10  # to load libtpu while another process loads it; one second apart


class Torus(NamedTuple):
    """The chips of one slice: coordinates of the devices and rates of the links.

    Attributes:
      coords: int [devices, 3], the chip of each device, in the order of the mesh.
      rings: per dimension, whether its last chip is linked to its first.
      link_rate: bytes per second over one link, one way.
      hbm_rate: memory bandwidth per device, in bytes per second.
      slices: number of slices, which are alike.
      network_rate: bytes per second from a device to another slice.
    """

    coords: np.ndarray
    rings: tuple[bool, ...]
    link_rate: float
    hbm_rate: float
    slices: int = 1
    network_rate: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.coords.max(0) + 1)


@functools.cache
def types() -> dict[str, str]:
    """Returns accelerator type of Cloud TPU → topology, as 'v5litepod-8' → 'v5e:2x4'."""
    lines = Path(__file__).with_name("tpu_types.csv").read_text().splitlines()
    return {name: topology for name, topology, _ in csv.reader(line for line in lines if not line.startswith("#"))}


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Returns the chip and the shape of a topology ('v3:8x8') or an accelerator type ('v3-128'); raises UserError."""
    generation, sizes = (*re.split("[:-]", types().get(name, name), maxsplit=1), "")[:2]
    generation = GENERATIONS.get(generation, generation)
    if generation not in CHIPS:
        raise UserError(f"unknown topology {name!r}; {did_you_mean(generation, CHIPS)}; with the chips along each "
                        "dimension, as v3:8x8 or v4:4x4x4, or an accelerator type, as v5litepod-8")
    if re.fullmatch(r"[^:]+-\d+", name) and name not in types():
        of_it = [one for one, topology in types().items() if topology.startswith(f"{generation}:")]
        nearest = min(of_it, key=lambda one: abs(int(one.split("-")[1]) - int(sizes)))
        raise UserError(f"unknown accelerator type {name!r}; nearest: {nearest}; known of {generation}: "
                        f"{', '.join(of_it)}; or write the chips along each dimension, as "
                        f"{generation}:{EXAMPLES[CHIPS[generation].dimensions]}")
    chip = CHIPS[generation]
    example = f"{generation}:{EXAMPLES[chip.dimensions]}"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise UserError(f"topology {name!r}: write the chips along each dimension, as {example}")
    shape = tuple(map(int, sizes.split("x")))
    if len(shape) != chip.dimensions:
        raise UserError(f"topology {name!r}: {generation} has {chip.dimensions} dimensions; write it as {example}")
    if math.prod(shape) > chip.most:
        raise UserError(f"topology {name!r} has {math.prod(shape)} chips; the largest pod of {generation} has "
                        f"{chip.most}")
    if any(size % 2 for size in shape[:2]) and f"{generation}:{sizes}" not in types().values():  # 1x1 is a chip alone
        even = "x".join(str(size + size % 2) if i < 2 else str(size) for i, size in enumerate(shape))
        raise UserError(f"topology {name!r}: a host has 2x2 chips, so the first two sizes must be even; nearest: "
                        f"{generation}:{even}")
    return chip, shape


def devices(name: str, slices: int = 1) -> list[Any]:
    """Returns the devices of `slices` slices, which need not be present, for a mesh to compile for.

    Raises:
      UserError: the name is unknown, libtpu is missing or in use, or it refuses the topology.
    """
    chip, shape = parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("planning for a TPU needs libtpu, the TPU compiler: pip install 'mae_jax[plan]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # outside of Cloud TPU there is no metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is used, so several processes may plan
    from jax.experimental import topologies

    several = {"num_slices": slices} if slices > 1 else {}
    for attempt in range(ATTEMPTS):
        try:
            with quiet_stderr():
                return list(topologies.get_topology_desc(
                    platform="tpu", topology_name=f"{chip.name}:{'x'.join(map(str, shape))}", **chip.options,
                    **several).devices)
        except jax.errors.JaxRuntimeError as error:
            if not re.search("lockfile|already in use", str(error)):
                raise UserError(f"libtpu refuses the topology {name!r}: {str(error).splitlines()[0]}") from None
            if attempt == ATTEMPTS - 1:
                raise UserError("libtpu is in use by another process; try again when that has ended") from None
        time.sleep(1)
    raise AssertionError("unreachable")


def torus(chip: Chip, devices: list[Any]) -> Torus:
    """Returns the torus of devices in the order of the mesh, in which equal slices follow one another."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    coords = np.array([device.coords for device in devices[: len(devices) // slices]])
    rings = tuple(bool(size > 2 and size % chip.ring == 0) for size in coords.max(0) + 1)
    sharing = len(coords) // len(np.unique(coords, axis=0))  # devices per chip
    return Torus(coords, rings, chip.link_rate, chip.hbm_rate, slices, chip.network_rate / sharing)


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drops output to file descriptor 2, such as libtpu's warnings about a machine without TPUs.

    Python's own standard error, with the progress line, is still shown.
    """
    kept = os.dup(2)
    with (tempfile.TemporaryFile() as sink, open(kept, "w", closefd=False) as seen,
          contextlib.redirect_stderr(progress.above(seen))):
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
