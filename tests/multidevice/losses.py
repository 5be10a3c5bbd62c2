"""Run by multidevice_test on 8 simulated devices: prints the losses of ten steps on 1 and, twice, on 8 of them."""

import json

import jax
import numpy as np

from mae_jax import sharding
from tests.tiny import tiny_batch, tiny_config, tiny_state, tiny_step

STEPS = 10
FIELDS = {"batch_size": 16, "train.duration": "20 steps", "optim.ema": 0.9}


def losses(config, devices) -> tuple[list[float], bytes, list[str]]:
    """Returns the losses, all bits of the last state, and how its leaves are placed."""
    mesh = sharding.make_mesh(config, devices)
    state = jax.device_put(tiny_state(config), sharding.replicated(mesh))
    step, out = tiny_step(config), []
    for number in range(STEPS):
        batch = tiny_batch(config, seed=number)
        batch["valid"][number % 3] = 0
        state, metrics = step(state, sharding.to_devices(batch, mesh, config.batch_size))
        out.append(float(metrics["loss"][0] / metrics["loss"][1]))
    leaves = jax.tree.leaves(state)
    bits = b"".join(np.asarray(leaf).tobytes() for leaf in leaves)
    return out, bits, sorted({str(leaf.sharding.is_fully_replicated) for leaf in leaves})


def main() -> None:
    config = tiny_config(FIELDS)
    one, _, _ = losses(config, jax.devices()[:1])
    (eight, first, placed), (_, second, _) = (losses(config, jax.devices()) for _ in range(2))
    accumulated, _, _ = losses(tiny_config(FIELDS | {"train.accumulate": 2}), jax.devices())
    print(json.dumps({"devices": jax.device_count(), "one": one, "eight": eight, "accumulated": accumulated,
                      "identical": first == second, "replicated": placed}))


if __name__ == "__main__":
    main()
