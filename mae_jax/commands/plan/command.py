"""Plans a run before any device is rented: compiles its train step for TPUs or GPUs that need not be present.

  mae_jax plan --config=vit_l_mae --topology=v3:8x8
  mae_jax plan --config=vit_l_mae --topology=h200:8 --price=3.50
  mae_jax plan --config=quickstart --devices=8
  mae_jax plan --config=vit_l_mae --topology=v3:8x8 \\
      --sweep='batch_size=2048,4096;model.remat=none,full'

TPUs are v2, v3, v4, v5e, v5p, v6e and 7x with the number of chips along each dimension, or accelerator types of Cloud
TPU: v3-128 is v3:8x8, v5litepod-8 is v5e:2x4 (the number counts cores, on v5e and v6e chips). They need libtpu, the
extra `plan`. GPUs are a100-40, a100-80, h100, h200 and l4, one to eight per host; they need JAX's CUDA plugin, the
extra `plan-gpu`. --config.mesh.slices=2 plans for two TPU slices. --devices=N simulates devices, without a time
estimate. A sweep compiles every combination of the values. If there are more than --best, it first compiles them with
the layers in a loop, which is fast, and then unrolls those that fit and move the least memory per image. Figures are
kept in --cache and reused while config, code and versions are the same.
"""

import json
import os

from absl import flags

from mae_jax import errors
from mae_jax.commands import cli

REQUIRED = ("config",)
CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string("topology", "", "TPU slice or GPUs to compile for, as v3:8x8, v5p-128 or h200:8")
DEVICES = flags.DEFINE_integer("devices", 0, "simulated devices to compile for instead")
SWEEP = flags.DEFINE_string("sweep", "", "fields and values to compare: 'batch_size=2048,4096;model.remat=none,full'")
BEST = flags.DEFINE_integer("best", 3, "number of combinations of a sweep that are compiled without loops, for a time",
                             lower_bound=0)
EXAMPLES = flags.DEFINE_integer("examples", 1_281_167, "number of training examples, for the hours; default: "
                                                       "ImageNet-1K's",
                                 lower_bound=1)
PRICE = flags.DEFINE_float("price", None, "price of one device for an hour, in any currency; on v2, v3 and 7x a "
                           "device is half a chip", lower_bound=0)
JSON = flags.DEFINE_string("json", "", "JSON file to write the same figures to")
CACHE = flags.DEFINE_string("cache", "~/.cache/mae_jax/plan", "folder of compiled programs; '': none")


def main() -> int:
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "CUDA_VISIBLE_DEVICES": "-1"}  # a GPU of this machine stays free
    import jax

    from mae_jax import config as configs
    from mae_jax import param_tree
    from mae_jax.commands.plan import cost, sweep
    from mae_jax.commands.plan.page import page
    from mae_jax.errors import UserError
    from mae_jax.runtime.progress import doing
    from mae_jax.storage.paths import output
    from mae_jax.training.warm_shape import with_shape

    if bool(TOPOLOGY.value) == bool(DEVICES.value):
        raise UserError("give one of --topology=v3:8x8 and --devices=8")
    config = with_shape(CONFIG.value)
    configs.validate(config)
    cells = sweep.parse(SWEEP.value, config) if SWEEP.value else []
    to = output(JSON.value, "--json")
    jax.config.update("jax_platforms", "cpu")  # nothing is executed, and a TPU of this machine stays free
    if DEVICES.value:
        cost.simulate(DEVICES.value)
    target = cost.target(TOPOLOGY.value, DEVICES.value, config.mesh.slices)
    if cells:
        result = sweep.run(config, target, cells, BEST.value, EXAMPLES.value, CACHE.value, doing)
        print(sweep.table(result, PRICE.value))
    else:
        found = cost.measure(config, target, EXAMPLES.value, CACHE.value, doing)
        result = cost.figures(config, target, found, EXAMPLES.value)
        print(page(config, result, PRICE.value))
    if to:
        written = {"price": PRICE.value, "config": param_tree.flat(config), "versions": cost.versions(), **result}
        to.write_text(json.dumps(written, indent=2) + "\n")
    return errors.FINISHED
