"""Run by multidevice_test on 8 simulated devices: prints the losses of twenty steps on several meshes."""

import json
import sys

import jax
import numpy as np

from mae_jax.runtime import sharding
from mae_jax.training.train_step import TrainStep
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_program, tiny_state

STEPS = 20
FIELDS = {"batch_size": 16, "train.duration": "20 steps", "optim.ema": 0.9, "model.width": 128, "model.heads": 4,
          "method.decoder_width": 64, "method.decoder_heads": 4}  # large enough for its kernels to be cut
MESHES = {
    "data": {},
    "zero": {"mesh.zero": "on"},
    "fsdp": {"mesh.data": 1, "mesh.fsdp": 8},
    "data x fsdp": {"mesh.fsdp": 2},
    "zero x fsdp": {"mesh.fsdp": 2, "mesh.zero": "on"},
    "tensor": {"mesh.data": 1, "mesh.tensor": 4, "mesh.fsdp": 2},
    "slices": {"mesh.slices": 2, "mesh.zero": "on"},
    "slices x data": {"mesh.slices": 2},
    "slices x fsdp": {"mesh.slices": 2, "mesh.fsdp": 2, "mesh.zero": "on"},
    "slices x tensor": {"mesh.slices": 2, "mesh.tensor": 2, "mesh.zero": "on"},
    "accumulated": {"mesh.zero": "on", "train.accumulate": 2},
    "scanned": {"mesh.zero": "on", "model.scan": True},
    "remat": {"mesh.fsdp": 4, "model.scan": True, "model.remat": "full"},
}


def program(fields, devices) -> TrainStep:
    config = tiny_config(FIELDS | fields)
    return tiny_program(config, devices)


def losses(program: TrainStep) -> tuple[list[float], bytes, float]:
    """Returns the losses, all bits of the last state, and the share of its bytes that one device holds."""
    config, mesh, out = program.method.config, program.mesh, []
    with jax.set_mesh(mesh):
        state = jax.device_put(tiny_state(config), jax.tree.map(lambda leaf: leaf.sharding, program.state))
        for number in range(STEPS):
            batch = tiny_batch(config, seed=number)
            batch["valid"][number % 3] = 0
            given = state
            state, metrics = program.step(given, sharding.to_devices(batch, mesh, config.batch_size))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given)), "the state was not donated"
            out.append(float(metrics["loss"][0] / metrics["loss"][1]))
    leaves = jax.tree.leaves(state)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves)
    return out, b"".join(np.asarray(leaf).tobytes() for leaf in leaves), held


def main() -> None:
    dtype, names = {"model.dtype": sys.argv[1]}, sys.argv[2:] or list(MESHES)
    found = {"devices": jax.device_count(), "one": losses(program(dtype, jax.devices()[:1]))[0], "held": {}}
    for name in names:
        built = program(dtype | MESHES[name], jax.devices())
        found[name], bits, found["held"][name] = losses(built)
    found["identical"] = bits == losses(built)[1]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
