"""Run by multidevice_test on 8 simulated devices: losses with terms across images, on one device and on several.

Prints method → mesh → the largest relative difference of the metrics, the largest difference of the new extras, and the
largest difference of a gradient relative to the largest value of it.
"""

import json

import jax
import numpy as np

from mae_jax.config import resolved
from mae_jax.runtime import sharding
from mae_jax.training.train_step import gradients
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_method, tiny_params, tiny_segment_batch, tiny_state

LARGE = {"batch_size": 16, "model.width": 128, "model.heads": 4}
DECODER = {"method.decoder_width": 64, "method.decoder_heads": 4}
FIELDS = {"splitmask": DECODER, "dino": {}, "beit": {}, "mixedae": DECODER | {"batch_size": 32},
          "moce": DECODER | {"method.experts": 8, "method.num_clusters": 6},
          "segment": {"method.head": "upernet", "method.train_blocks": -1, "method.head_width": 64,
                      "method.relative_position_bias": True},
          "segment/probe": {"method.head": "probe"},
          "moce/token": DECODER | {"method.experts": 4, "method.gate": "token"}}  # fewer experts than devices
MESHES = {"4 devices": (4, {}), "8 devices": (8, {"mesh.zero": "on"}), "4 x 2": (8, {"mesh.tensor": 2}),
          "2 slices": (8, {"mesh.slices": 2, "mesh.zero": "on"})}


def made(name, devices, fields):
    """Returns the metrics, the new extras and the gradients of one step from the same state and batch."""
    fields, name = LARGE | FIELDS[name] | fields, name.split("/")[0]
    config = tiny_config(fields, name)
    mesh, method = sharding.make_mesh(resolved(config), devices), tiny_method(config)
    batch = tiny_segment_batch(config) if name == "segment" else tiny_batch(config)
    batch["valid"][5] = 0
    draws = np.random.default_rng(2)
    extras = jax.tree.map(np.asarray, {
        "mixedae": dict,
        "segment": lambda: jax.jit(method.init)(jax.random.key(0), batch)[1],
        "moce": lambda: {"centroids": draws.normal(size=(6, 128)).astype(np.float32), "share": np.full(6, 1 / 6)
                         } if config.method.gate == "cluster" else {},
        "dino": lambda: {"teacher": tiny_params(config, 1), "center": np.zeros(config.method.out_dim, np.float32)},
    }.get(name, lambda: {"vocabulary": np.random.default_rng(2).normal(size=(23, 48)).astype(np.float32)})())
    with jax.set_mesh(mesh):
        state = tiny_state(config, extras, method)
        state = jax.device_put(state, sharding.param_shardings(mesh, state))
        compute = jax.jit(lambda state, batch: gradients(method, state, batch, jax.random.key(0), 1))
        grads, metrics, new = compute(state, sharding.to_devices(batch, mesh, config.batch_size))
    return jax.device_get(({key: total / weight for key, (total, weight) in metrics.items()}, new, grads))


def largest(ours, theirs, relative: bool) -> float:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    apart = [np.abs(a - b).max() / (max(np.abs(b).max(), 1e-3) if relative else 1) for a, b in pairs]
    return float(max(apart, default=0.0))


def main() -> None:
    found: dict[str, dict[str, list[float]]] = {}
    for name in FIELDS:
        one = made(name, jax.devices()[:1], {})
        for mesh, (devices, fields) in MESHES.items():
            if name == "segment" and mesh not in ("8 devices", "4 x 2"):
                continue  # which takes long to compile
            some = made(name, jax.devices()[:devices], fields)
            found.setdefault(name, {})[mesh] = [
                largest(a, b, relative) for a, b, relative in zip(some, one, (True, False, True), strict=True)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
