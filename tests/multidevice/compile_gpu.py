"""Run by gpu_test: compiles two layers of the ViT-B recipe for one H200, also in a loop, and for eight."""

import json

import jax

from mae_jax import config as configs
from mae_jax.commands.plan import cost
from tests.config.config_test import RECIPES, recipe


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    vit_b = next(path for path in RECIPES if path.stem == "vit_b_mae")
    config = configs.from_dict(recipe(vit_b).to_dict()).unlock()
    small = {"batch_size": 64, "model.depth": 2, "method.decoder_depth": 1}
    config.update_from_flattened_dict(small)
    out = {}
    for name, topology, scan in (("h200:1", "h200:1", False), ("scan", "h200:1", True), ("h200:8", "h200:8", False)):
        config.model.scan = scan
        target = cost.target(topology, 0)
        out[name] = cost.figures(config, target, cost.measure(config, target, 1_281_167), 1_281_167)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
