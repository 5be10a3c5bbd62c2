"""Run by multidevice_test on 8 simulated devices: supervised losses on several meshes, and what evaluations count.

Images have the colors of their labels, so that answers are clear; how clear, is told too: the least margin of logits.
"""

import json

import jax
import numpy as np

from mae_jax.evals.evaluator import Evaluator
from mae_jax.runtime import sharding
from mae_jax.state import TrainState
from mae_jax.training.train_step import TrainStep
from tests.helpers import margins
from tests.helpers.tiny import raster_batch, tinted, tiny_program, tiny_supervised

STEPS = 6
EVALUATED = 27  # of two batches of 16
LARGE = {"batch_size": 16, "train.duration": f"{STEPS} steps", "model.width": 128, "model.heads": 4,
         "method.head_std": 1.0}  # kernels are cut, and logits differ
ARMS = {
    "deit3": {"optim.name": "lamb", "optim.clip": 1.0, "optim.ema": 0.9, "model.layer_scale": 0.1,
              "model.drop_path": 0.3, "model.positions": "random", "method.loss": "bce", "method.mixup": 0.8,
              "method.cutmix": 1.0, "method.mix_group": 2, "method.erase": 0.25},
    "probe": {"optim.name": "lars", "optim.lr": 20.0, "method.head": "probe", "method.train_blocks": 0.0,
              "model.pool": "cls"},
}
MESHES = {"data": {}, "zero": {"mesh.zero": "on"}, "tensor": {"mesh.data": 2, "mesh.tensor": 4}}


class Inputs:
    """An evaluation split whose last batch is not full."""

    classes = ("a", "b", "c")

    def __init__(self, config):
        self.config = config

    def evaluate(self):
        for number in range(2):
            batch = tinted(raster_batch(self.config, seed=50 + number))
            beyond = number * 16 + np.arange(16) >= EVALUATED
            batch["valid"][beyond], batch["label"][beyond] = 0, -1
            yield batch

    validate = support = evaluate


def train(config, devices) -> tuple[list[float], TrainState, TrainStep]:
    """Returns the losses, the last state, and what they were made with."""
    program, losses = tiny_program(config, devices), []
    with jax.set_mesh(program.mesh):
        batches = [tinted(raster_batch(config, seed)) for seed in range(STEPS)]
        placed = [sharding.to_devices(batch, program.mesh, config.batch_size) for batch in batches]
        state = program.init(placed[0])
        for batch in placed:
            state, metrics = program.step(state, batch)
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return losses, state, program


def evaluate(state: TrainState, config, devices) -> dict:
    """Returns the figures of a state, moved to these devices, and the table of confusions."""
    program = tiny_program(config, devices)
    with jax.set_mesh(program.mesh):
        state = jax.device_put(jax.device_get(state), jax.tree.map(lambda leaf: leaf.sharding, program.state))
        evaluator = Evaluator(program.method, Inputs(config), program.mesh)
        return evaluator.scalars(state) | {"confusion": evaluator.notes["classification"][1].tolist()}


def main() -> None:
    found: dict = {}
    for arm, fields in ARMS.items():
        config = tiny_supervised(LARGE | fields)
        one, state, program = train(config, jax.devices()[:1])
        clear = min(margins.of_classifier(program.method, params, state.extras, Inputs(config).evaluate())
                    for params in (state.params, state.ema) if params)
        found[arm] = {"clear": clear, "one": one, "figures": {"one": evaluate(state, config, jax.devices()[:1])}}
        for name, mesh in MESHES.items():
            cut = tiny_supervised(LARGE | fields | mesh)
            found[arm][name] = train(cut, jax.devices())[0]
            found[arm]["figures"][name] = evaluate(state, cut, jax.devices())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
