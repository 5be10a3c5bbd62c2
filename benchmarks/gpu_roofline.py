"""Lower bound of the time of a config's train step on an H200, from XLA's compiled text; no GPU is needed.

  python benchmarks/gpu_roofline.py --config=configs/vit_b_mae.py --config.batch_size=256
  python benchmarks/gpu_roofline.py --config=configs/vit_l_mae.py --config.batch_size=256 --top=40 --hlo=step.txt

Needs jax[cuda12]. The step is compiled with unrolled layers, one micro-batch and bfloat16. The bound has two parts: the
bytes that all kernels move (counted by mae_jax/commands/plan/gpu_text.py), at the rate that copies reach, and the
model's FLOPs, at the rate that large products reach. Without a GPU, XLA cannot autotune the implementation of products,
so that these kernels differ from those on a real GPU.
"""

import os
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs
# Autotuning needs a GPU, and products by Triton do not compile without it.
os.environ["XLA_FLAGS"] = ("--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false "
                           + os.environ.get("XLA_FLAGS", ""))

import jax
from absl import flags
from jax.experimental import topologies

from mae_jax import errors
from mae_jax.commands import cli
from mae_jax.commands.plan import gpu_text
from mae_jax.data import ASSUMED
from mae_jax.training.throughput import train_flops
from mae_jax.training.train_step import TrainStep, build

CONFIG = cli.define_config()
GPUS = flags.DEFINE_integer("gpus", 1, "of one host")
TARGET = flags.DEFINE_string("target", str(Path(__file__).parent / "targets" / "h200.pbtxt"), "XLA's description")
BANDWIDTH = flags.DEFINE_float("bandwidth", 4.3e12, "bytes per second, of copies (measured on an H200)")
PEAK = flags.DEFINE_float("peak", 790e12, "FLOP/s, of large bfloat16 products (measured on an H200)")
TOP = flags.DEFINE_integer("top", 20, "of the largest kernels to list")
HLO = flags.DEFINE_string("hlo", "", "file to write the compiled text to")


def program() -> TrainStep:
    """Builds the step of the config for GPUs that are not there."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=Path(TARGET.value).read_text(),
                                            topology=f"1x1x{GPUS.value}")
    config = CONFIG.value.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict({"model.dtype": "bfloat16", "model.scan": False, "train.accumulate": 1})
    return build(config, ASSUMED, list(topology.devices))


def main() -> int:
    step, began = program(), time.monotonic()
    with jax.set_mesh(step.mesh):
        compiled = step.step.trace(step.state, step.batch).lower(lowering_platforms=("cuda",)).compile()
    text, seconds = compiled.as_text(), time.monotonic() - began
    if HLO.value:
        Path(HLO.value).write_text(text)
    found = gpu_text.kernels(text)
    moved, rows = gpu_text.moved(found), CONFIG.value.batch_size / GPUS.value
    memory, math = moved / BANDWIDTH.value, train_flops(step.method) * rows / PEAK.value
    print(f"compiled in {seconds:.0f} s; {gpu_text.count(found):,} kernels, {moved / 1e9:.1f} GB moved, "
          f"{compiled.memory_analysis().temp_size_in_bytes / 2**30:.1f} GiB of temporaries\n"
          f"floor {memory * 1e3:.1f} ms of memory + {math * 1e3:.1f} ms of products: "
          f"{rows / (memory + math):,.0f} images/s per GPU")
    for kind, (launches, moved) in gpu_text.by_kind(found).items():
        print(f"{moved / 1e9:9.2f} GB {launches:6d} {kind}")
    for one in sorted(found, key=lambda one: -one.bytes * one.runs)[:TOP.value]:
        print(f"{one.bytes * one.runs / 1e9:9.3f} GB  {one.kind:24} {one.shape[:60]:60} {one.source[-80:]}")
    return errors.FINISHED


if __name__ == "__main__":
    cli.run(main, __doc__)
