"""Run by multidevice_test on 8 simulated devices: what changes hands between meshes, and what never exists whole."""

import json
import re
import tempfile

import jax
import numpy as np

from mae_jax.config import vit
from mae_jax.runtime import sharding
from mae_jax.storage.checkpoint import Checkpoints
from mae_jax.training.train_step import TrainStep
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_program
from tests.multidevice.losses import FIELDS

MESHES = ({"mesh.zero": "on"}, {"mesh.fsdp": 4, "mesh.data": 2}, {"mesh.tensor": 4, "mesh.fsdp": 2, "mesh.data": 1}, {})


def program(fields, devices=None) -> TrainStep:
    config = tiny_config(FIELDS | fields)
    return tiny_program(config, devices)


def restored_everywhere() -> bool:
    """Saves a trained state on each mesh in turn and restores it on the next one, at last on one device."""
    first = program(MESHES[0])
    with jax.set_mesh(first.mesh):
        batch = sharding.to_devices(tiny_batch(first.method.config), first.mesh, first.method.config.batch_size)
        state = first.step(first.init(batch), batch)[0]
    wanted = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    for fields in (*MESHES[1:], "one"):
        target = program({}, jax.devices()[:1]) if fields == "one" else program(fields)
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(folder, 2)
            checkpoints.save(int(state.step), state)
            checkpoints.wait()
            state = checkpoints.restore(target.state)
            checkpoints.close()
        for leaf, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(target.state), strict=True):
            assert leaf.sharding == abstract.sharding
        if [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)] != wanted:
            return False
    return True


def initialization() -> tuple[float, int]:
    """Compiles the initial state of blocks as wide as ViT-H's over fsdp=8.

    Returns:
      How many times the bytes of all parameters one device holds at the most, and how many collectives there are.
    """
    config = tiny_config({"batch_size": 64, "data.image_size": (224, 224), "mesh.data": 1, "mesh.fsdp": 8})
    config.model.update(vit("H", patch=14), depth=2)
    config.method.update(decoder_width=512, decoder_heads=16)
    large = tiny_program(config)
    with jax.set_mesh(large.mesh):
        compiled = large.init.lower(large.batch).compile()
    memory = compiled.memory_analysis()
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(large.state.params))
    collectives = len(re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute)\(", compiled.as_text()))
    return (memory.temp_size_in_bytes + memory.output_size_in_bytes) / whole, collectives


def reduced(fields) -> dict[str, int]:
    """Returns dtype → values that the step's reduce-scatters and all-reduces take in, without scalars."""
    built = program({"model.dtype": "bfloat16", "mesh.zero": "on"} | fields)
    with jax.set_mesh(built.mesh):
        # Before XLA compiles it: CPUs have no bfloat16 sums, and take float32 ones instead.
        text = built.step.lower(built.state, built.batch).as_text()
    found: dict[str, int] = {}
    for shape in re.findall(r'"stablehlo.reduce_scatter"\(.*?\) <\{.*?\}> \(\{.*?\}\) : \(tensor<([\dx]+x\w+)>\)', text,
                            re.DOTALL):
        *sizes, dtype = shape.split("x")
        found[dtype] = found.get(dtype, 0) + int(np.prod([int(size) for size in sizes]))
    return found


def main() -> None:
    held, collectives = initialization()
    print(json.dumps({"restored": restored_everywhere(), "held": held, "collectives": collectives,
                      "float32": reduced({}), "bfloat16": reduced({"mesh.reduce": "bfloat16"}),
                      "cut": sum(leaf.size for leaf in jax.tree.leaves(program({"mesh.zero": "on"}).state.params)
                                 if not leaf.sharding.is_fully_replicated)}))


if __name__ == "__main__":
    main()
