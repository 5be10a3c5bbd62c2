"""Cost of summing gradients and gathering parameters on TPU slices, by the planner's model; no TPU is needed.

  python benchmarks/tpu_stages.py --topology=v5e:8x8 --topology=v5p:4x4x4

For each slice it prints one line for the mesh of a run there, and one for a single stage over all devices, which the
compiler would turn into an all-reduce: milliseconds to reduce-scatter --parameters in float32, and to all-gather them
in bfloat16. Nothing is compiled. Needs libtpu, no TPU; seconds.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs, and a TPU of this machine stays free

import numpy as np
from absl import flags
from jax.sharding import Mesh

from mae_jax import errors
from mae_jax.commands import cli
from mae_jax.commands.plan import collectives, tpu
from mae_jax.config import default, for_platform
from mae_jax.ops.partitioning import CUTS
from mae_jax.runtime.sharding import AXES, make_mesh

TOPOLOGY = flags.DEFINE_multi_string("topology", ["v5e:8x8", "v6e:8x8", "v5p:4x4x4", "v4:4x4x8"], "a TPU slice")
PARAMETERS = flags.DEFINE_float("parameters", 329_239_296, "how many; ViT-L MAE has the default")


def stages(mesh: Mesh, torus: tpu.Torus) -> list[tuple[int, float, float]]:
    """Returns for each stage the devices of a group, and the seconds of a reduce-scatter and of an all-gather."""
    found, values = [], PARAMETERS.value
    positions = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    for axis in CUTS:
        size = mesh.shape[axis]
        if size > 1:
            groups = np.moveaxis(positions, AXES.index(axis), -1).reshape(-1, size)
            rate = collectives.seconds_per_byte("reduce-scatter", tuple(map(tuple, groups.tolist())), torus)
            found.append((size, rate * values * 4, rate * values * 2))
            values /= size
    return found


def main() -> int:
    config = for_platform(default(), "tpu").unlock()
    for name in TOPOLOGY.value:
        devices, (chip, _) = tpu.devices(name), tpu.parse(name)
        config.batch_size = len(devices)
        chosen = make_mesh(config, devices)
        for mesh in (chosen, Mesh(chosen.devices.reshape(1, -1, 1, 1), AXES)):
            found = stages(mesh, tpu.torus(chip, list(mesh.devices.flat)))
            parts = " + ".join(f"{sums * 1e3:.2f} + {gathers * 1e3:.2f} over {size}" for size, sums, gathers in found)
            total = sum(sums + gathers for _, sums, gathers in found)
            print(f"{name}: {total * 1e3:.1f} ms = {parts}", flush=True)
    return errors.FINISHED


if __name__ == "__main__":
    cli.run(main, __doc__)
