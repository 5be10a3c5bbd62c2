"""Measures a config's speed: the train step alone, the input alone, and both together.

  mae_jax bench --config=vit_b_mae --parts=step --config.batch_size=8
  mae_jax bench --config=quickstart --to=speed.json

`step` runs on random data that is already on the device, and needs no TensorFlow. If it is the only part, the data set
is assumed to be ImageNet-1K. FLOPs are those of the model's matrix products, counted analytically
(`Method.forward_flops`); MFU is their share of the chip's dense bfloat16 peak.
"""

import json
import os
from typing import Any

from absl import flags

from mae_jax import errors
from mae_jax.commands import cli

REQUIRED = ("config",)
ALL_PARTS = ("step", "input", "both")
CONFIG = cli.define_config()
PARTS = flags.DEFINE_list("parts", list(ALL_PARTS), "what to measure")
SECONDS = flags.DEFINE_float("seconds", 10.0, "how long each part is measured, after its warm-up")
TO = flags.DEFINE_string("to", "", "JSON file to write as well")


def main() -> int:
    import jax

    from mae_jax import config as configs
    from mae_jax import param_tree
    from mae_jax.commands.bench.timed_step import measure
    from mae_jax.errors import UserError, did_you_mean
    from mae_jax.storage.paths import output
    from mae_jax.training.warm_shape import with_shape

    for part in PARTS.value:
        if part not in ALL_PARTS:
            raise UserError(f"unknown part {part!r}; {did_you_mean(part, ALL_PARTS)}")
    config = with_shape(CONFIG.value)
    configs.validate(config)
    to = output(TO.value, "--to")
    device = jax.devices()[0]
    results: dict[str, Any] = {"device": device.device_kind, "devices": jax.device_count(),
                               "cores": os.cpu_count(), "batch_size": config.batch_size,
                               "config": param_tree.flat(config)}
    measured = measure(config, PARTS.value, SECONDS.value)
    for name, figures in measured:
        results[name] = figures
        print(f"{name:<6}" + "  ".join(f"{key} {_text(value)}" for key, value in figures.items()), flush=True)
    if to:
        to.write_text(json.dumps(results, indent=2) + "\n")
    return errors.FINISHED


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
