"""Run by topologies_test: the collectives of a small step over slices that are not there, as the planner reads them."""

import json
import sys

import jax
import jax.numpy as jnp

from mae_jax.commands.plan import collectives, cost, tpu
from mae_jax.config import default, for_platform
from mae_jax.ops.linear import linear
from mae_jax.runtime import sharding

SHAPES = ((1024, 4096), (4096,), (4096, 1024), (1024,))


def step(params: list[jax.Array], x: jax.Array) -> list[jax.Array]:
    """Returns the parameters of a small network after a step of gradient descent."""
    def loss(params: list[jax.Array]) -> jax.Array:
        y = linear(jax.nn.relu(linear(x, *params[:2])), *params[2:])
        return (y.astype(jnp.float32) ** 2).mean()

    return jax.tree.map(lambda value, gradient: value - 0.1 * gradient, params, jax.grad(loss)(params))


def compiled(name: str, slices: int) -> list[dict]:
    """Returns the planner's rows of the collectives on so many slices of a topology."""
    devices = tpu.devices(name, slices)
    config = for_platform(default(), "tpu").unlock()
    config.batch_size = 2 * len(devices)
    mesh = sharding.make_mesh(config, devices)
    params = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.param_sharding(mesh, "kernel", shape))
              for shape in SHAPES]
    rows = (config.batch_size, 64, SHAPES[0][0])
    x = jax.ShapeDtypeStruct(rows, jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        made = jax.jit(step, out_shardings=[param.sharding for param in params]).lower(params, x).compile()
    torus = tpu.torus(tpu.parse(name)[0], list(mesh.devices.flat))
    return collectives.table(list(collectives.parse(cost._text(made), len(torus.coords))), torus)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    cases = [argument.split("*") for argument in sys.argv[1:]]
    print(json.dumps({f"{name}*{slices}": compiled(name, int(slices)) for name, slices in cases}))


if __name__ == "__main__":
    main()
