"""The MAE train step: ours and Hugging Face's ViTMAE in PyTorch, eager and compiled, alternating in one run.

  python benchmarks/torch_mae.py                  (CPU: ViT-B/16, batch 8, float32; about 5 minutes)
  taskset -c 0 python benchmarks/torch_mae.py     (the same with one thread each)
  python benchmarks/torch_mae.py --device=gpu     (ViT-B and ViT-L, bfloat16, several batch sizes)

Ours is the package's own jitted, donating step from uint8 patches. Hugging Face's gets pixels that are already
normalized floats, fused AdamW, and on GPUs bfloat16 autocast. All data are on the device. Both sides have the same
number of threads. CPU time is reported as well, since other processes on the machine do not disturb it.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs its share of a GPU's memory

import jax
import recipes
import torch
from absl import flags
from ml_collections import ConfigDict
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mae_jax.commands.bench.timed_step import TimedStep
from mae_jax.interop.hf import hf_config

Step = Callable[[], None]
RESULTS = Path(__file__).parent / "results"
SIZES = {"cpu": {"B": [8]}, "gpu": {"B": [64, 128, 256, 512, 1024], "L": [64, 128, 256, 512]}}
STEPS = {"cpu": 1, "gpu": 10}  # between two readings of the clock
DECAY = 0.05


def our_step(config: ConfigDict, device: str) -> Step:
    timed = TimedStep(config)
    return lambda: [timed.run(timed.batch) for _ in range(STEPS[device])]


def torch_step(config: ConfigDict, device: str, compiled: bool) -> Step:
    """Returns a step of ViTMAE with AdamW as MAE uses it: biases and norms do not decay."""
    place = "cuda" if device == "gpu" else "cpu"
    model = ViTMAEForPreTraining(ViTMAEConfig(**hf_config(config), attn_implementation="sdpa")).to(place)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": DECAY},
              {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if compiled else model
    pixels = torch.randn(config.batch_size, 3, *config.data.image_size, device=place)

    def step() -> None:
        for _ in range(STEPS[device]):
            with torch.autocast(place, torch.bfloat16, enabled=device == "gpu"):
                loss = forward(pixels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device

    return step


CONTENDERS: dict[str, Callable[[ConfigDict, str], Step]] = {
    "mae_jax": our_step,
    "hf_eager": lambda config, device: torch_step(config, device, compiled=False),
    "hf_compile": lambda config, device: torch_step(config, device, compiled=True),
}


def compare(config: ConfigDict, device: str, rounds: int,
            contenders: dict[str, Callable[[ConfigDict, str], Step]] = CONTENDERS) -> dict[str, Any]:
    """Returns contender → figures, each reading after one of every other contender; what does not fit is None."""
    steps, readings = {}, {}
    for name, make in contenders.items():
        began = time.perf_counter()
        try:
            step = make(config, device)
            step()
        except Exception as error:
            if "out of memory" not in str(error).lower() and "RESOURCE_EXHAUSTED" not in str(error):
                raise
        else:
            steps[name], readings[name] = step, []
            print(f"{name}: {time.perf_counter() - began:.1f} s until its first step is done", flush=True)
    for index in range(rounds + 1):  # the first round warms up
        for name, step in steps.items():
            cpu, began = cpu_seconds(), time.perf_counter()
            step()
            if index:
                readings[name].append((time.perf_counter() - began, cpu_seconds() - cpu))
    return {name: figures(readings.get(name), config.batch_size, STEPS[device]) for name in contenders}


def figures(readings: list[tuple[float, float]] | None, batch_size: int, steps: int) -> dict[str, float] | None:
    if not readings:
        return None
    wall, cpu = ([value / steps for value in values] for values in zip(*readings, strict=True))
    median = statistics.median(wall)
    return {"seconds": median, "seconds_min": min(wall), "cpu_seconds": statistics.median(cpu),
            "cpu_seconds_min": min(cpu), "images_per_sec": batch_size / median,
            "images_per_sec_best": batch_size / min(wall)}


def ratios(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Returns peer → how many times faster we are, by median wall, least wall, and CPU time."""
    ours, keys = row["mae_jax"], ("seconds", "seconds_min", "cpu_seconds", "cpu_seconds_min")
    return {name: {key: peer[key] / ours[key] for key in keys} for name, peer in row.items()
            if ours and peer and name != "mae_jax"}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def machine(device: str) -> dict[str, Any]:
    names = {line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")} if Path("/proc/cpuinfo").exists() else {platform.processor()}
    return {"device": torch.cuda.get_device_name() if device == "gpu" else ", ".join(sorted(names)),
            "threads": torch.get_num_threads(), "python": platform.python_version(), "load_before": os.getloadavg()[0],
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
            **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "torch", "transformers")}}


def gemm_gflops() -> dict[str, float]:
    """Returns 1e9 FLOP per second of CPU time of a linear layer in each library: they may differ widely."""
    shapes = (1576, 512), (512, 2048)  # the decoder's first MLP layer, 8 images
    ours = [jax.numpy.ones(shape) for shape in shapes]
    theirs = [torch.ones(shape) for shape in shapes]
    product = jax.jit(jax.numpy.matmul)
    calls = {"jax": lambda: product(*ours).block_until_ready(), "torch": lambda: theirs[0] @ theirs[1]}
    rates = {}
    for name, call in calls.items():
        call()
        began = cpu_seconds()
        for _ in range(50):
            call()
        rates[name] = 50 * 2 * 1576 * 512 * 2048 / (cpu_seconds() - began) / 1e9
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--to", type=Path, help="default: benchmarks/results/torch_mae_<device>.json")
    options = parser.parse_args()
    flags.FLAGS(["vs_torch_mae"])
    torch.set_float32_matmul_precision("highest" if options.device == "cpu" else "high")
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA's pool has
    results: dict[str, Any] = {"machine": machine(options.device), "rows": []}
    if options.device == "cpu":
        results["machine"]["gemm_gflops_per_cpu_second"] = gemm_gflops()
    for size, batches in SIZES[options.device].items():
        for batch_size in batches:
            row = compare(recipes.mae(size, batch_size), options.device, options.rounds)
            results["rows"].append({"model": f"ViT-{size}/16", "batch_size": batch_size, **row, "ratios": ratios(row)})
            print(json.dumps(results["rows"][-1], indent=1), flush=True)
            gc.collect()
            jax.clear_caches()
            torch._dynamo.reset()
            if options.device == "gpu":
                torch.cuda.empty_cache()
    results["machine"]["load_after"] = os.getloadavg()[0]
    path = options.to or RESULTS / f"torch_mae_{options.device}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
