"""Run by multidevice_test on 128 simulated devices: compiles the ViT-L recipe's train step, global batch 4096."""

import importlib.util
import json
import time

import jax
from jax.sharding import NamedSharding

from mae_jax.data import ASSUMED
from mae_jax.training.train_step import build


def main() -> None:
    spec = importlib.util.spec_from_file_location("vit_l_mae", "configs/vit_l_mae.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = recipe.get_config()
    config.model.scan = True
    program = build(config, ASSUMED)
    began = time.monotonic()
    with jax.set_mesh(program.mesh):
        compiled = program.step.lower(program.state, program.batch).compile()
    out, _ = compiled.output_shardings
    placed = jax.tree.leaves(out, is_leaf=lambda leaf: isinstance(leaf, NamedSharding))
    print(json.dumps({
        "devices": program.mesh.size,
        "batch": config.batch_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(program.state.params)),
        "replicated": all(leaf.is_fully_replicated for leaf in placed),
        "all_reduces": compiled.as_text().count("all-reduce"),
        "seconds": time.monotonic() - began,
    }))


if __name__ == "__main__":
    main()
