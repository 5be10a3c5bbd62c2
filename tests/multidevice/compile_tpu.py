"""Run by plan_test: compiles two layers of the ViT-L recipe for a TPU v3 slice of four chips, with and without ZeRO."""

import json

import jax

from mae_jax import config as configs
from mae_jax.commands.plan import cost
from mae_jax.data import ASSUMED
from mae_jax.ops.partitioning import SMALL
from mae_jax.param_tree import flatten
from mae_jax.training.train_step import build
from tests.config.config_test import RECIPES, recipe


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    target = cost.target("v3:2x2", 0)
    vit_l = next(path for path in RECIPES if path.stem == "vit_l_mae")
    config = configs.from_dict(recipe(vit_l).to_dict()).unlock()
    config.update_from_flattened_dict({"batch_size": 256, "model.depth": 1, "method.decoder_depth": 1})
    out = {}
    for zero in ("off", "on"):
        config.mesh.zero = zero
        found = cost.measure(config, target, 1_281_167)
        program = build(config, ASSUMED, target.devices)
        leaves = flatten(program.state.params)
        sizes = [leaf.size for leaf in leaves.values()]
        out[zero] = {"figures": cost.figures(config, target, found, 1_281_167), "values": sum(sizes),
                     "cut_values": sum(size for size in sizes if size >= SMALL),
                     # The kernel of queries, keys and values is gathered in three parts.
                     "cut": sum(3 if name.endswith("qkv/kernel") else 1
                                for name, leaf in leaves.items() if leaf.size >= SMALL)}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
