"""Run by multidevice_test on 128 simulated devices: compiles the ViT-L recipe's train step, global batch 4096."""

import importlib.util
import json
import time

import jax
from jax.sharding import NamedSharding

from mae_jax import methods, optim, sharding
from mae_jax.step import init_state, make_train_step


def main() -> None:
    spec = importlib.util.spec_from_file_location("vit_l_mae", "configs/vit_l_mae.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = recipe.get_config()
    config.model.scan = True
    mesh, method = sharding.make_mesh(config), methods.get("mae")(config)
    optimizer, schedule = optim.make_optimizer(config), optim.make_schedule(config, 1_281_167)
    shapes = jax.eval_shape(lambda batch: init_state(config, method, optimizer, batch), method.batch_spec())
    state = sharding.with_sharding(shapes, sharding.replicated(mesh))
    batch = sharding.with_sharding(method.batch_spec(), sharding.batch_sharding(mesh))
    began = time.monotonic()
    step = jax.jit(make_train_step(config, method, optimizer, schedule), donate_argnums=0)
    compiled = step.lower(state, batch).compile()
    out, _ = compiled.output_shardings
    placed = jax.tree.leaves(out, is_leaf=lambda leaf: isinstance(leaf, NamedSharding))
    print(json.dumps({
        "devices": mesh.size,
        "batch": config.batch_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes.params)),
        "replicated": all(leaf.is_fully_replicated for leaf in placed),
        "all_reduces": compiled.as_text().count("all-reduce"),
        "seconds": time.monotonic() - began,
    }))


if __name__ == "__main__":
    main()
