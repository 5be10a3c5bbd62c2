"""Run by multidevice_test on 8 simulated devices: prints how far what GPUs compute on meshes is from one CPU device."""

import json

import jax
import numpy as np
import pytest

from mae_jax.param_tree import flatten
from tests.helpers.gpu import pretend
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_params, tiny_program
from tests.multidevice.losses import FIELDS, MESHES


def gradients(fields: dict, devices: list) -> dict[str, np.ndarray]:
    """Returns the loss, and the gradient of each parameter."""
    config = tiny_config(FIELDS | fields)
    program = tiny_program(config, devices)
    with jax.set_mesh(program.mesh):
        params = jax.device_put(tiny_params(config), jax.tree.map(lambda leaf: leaf.sharding, program.state.params))
        loss, grads = jax.jit(jax.value_and_grad(lambda params: program.method.loss(
            params, {}, tiny_batch(config), jax.random.key(0), 0, True)[0]))(params)
    return {name: np.asarray(leaf) for name, leaf in (flatten(grads) | {"loss": loss}).items()}


def main() -> None:
    wanted, found = gradients({}, jax.devices()[:1]), {}
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch)
        for name in ("data", "fsdp", "tensor"):
            ours = gradients(MESHES[name], jax.devices())
            found[name] = max(float(np.abs(ours[path] - leaf).max() / np.abs(leaf).max())
                              for path, leaf in wanted.items())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
