"""Utilization by method: achieved FLOP/s of the train step, and its time relative to MAE's, measured alternately.

  python benchmarks/methods.py                       (ViT-B/16 at 224 pixels)
  python benchmarks/methods.py --batch=256 --rounds=30       (one GPU)
  python benchmarks/methods.py --experts=8 --batch=64 --rounds=5     (MoCE beside MAE: methods_8_experts_<device>)

FLOPs are those of the matrix products, counted analytically (`Method.forward_flops`), so that methods with different
amounts of work can be compared. Writes benchmarks/results/methods_<device>.json, with each round's times, and .md.
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from mae_jax.commands.bench.timed_step import TimedStep

RESULTS = Path(__file__).parent / "results"
RECIPES = {"MAE": "vit_b_mae:repo", "SplitMask": "vit_b_splitmask", "BEiT": "vit_b_beit",
           "MixedAE": "vit_b_mixedae", "naive mixing": "vit_b_mixedae:naive", "DINO, ViT-S": "vit_s_dino"}


def recipe(text: str) -> Any:
    """Returns the unlocked config of 'file:argument'."""
    name, _, arg = text.partition(":")
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    # The optimizer's work grows with the experts and not with the batch, so that they are measured apart.
    parser.add_argument("--experts", type=int, help="MoCE of so many, in place of the other methods")
    options = parser.parse_args()
    mixture = f"MoCE, {options.experts} experts"
    recipes = {"MAE": RECIPES["MAE"], mixture: "moce"} if options.experts else RECIPES
    configs = {name: recipe(text).unlock() for name, text in recipes.items()}
    for config in configs.values():
        config.batch_size = options.batch
    if options.experts:
        configs[mixture].method.update(num_clusters=256, experts=options.experts)
    with ThreadPoolExecutor() as pool:  # compiles them at the same time
        steps = dict(zip(configs, pool.map(TimedStep, configs.values()), strict=True))
    for step in steps.values():
        step.run(step.batch)  # the first one also touches all memory
    times: dict[str, list[float]] = {name: [] for name in recipes}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name] += [_seconds(step)]
    device = jax.devices()[0].device_kind
    result = {"device": device, "cores": os.cpu_count(), "batch": options.batch, "load": os.getloadavg()[0],
              "gflop_per_image": {name: step.flops_per_image / 1e9 for name, step in steps.items()}, "seconds": times}
    kind = f"methods_{options.experts}_experts" if options.experts else "methods"
    stem = RESULTS / f"{kind}_{re.sub('[^a-z0-9]+', '_', device.lower())}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(result))
    print(table(result))


def _seconds(step: TimedStep) -> float:
    began = time.perf_counter()
    step.run(step.batch)
    return time.perf_counter() - began


def table(result: dict[str, Any]) -> str:
    """Returns the Markdown table; ratios to MAE are of the same round, their median (least to most)."""
    flops, times = result["gflop_per_image"], result["seconds"]
    lines = [f"ViT-B/16, batch {result['batch']}, {result['device']} ({result['cores']} cores, load average "
             f"{result['load']:.1f}); median of {len(times['MAE'])} alternating rounds.", "",
             "| method | GFLOP per image and step | s per step | of MAE's | GFLOP/s | of MAE's |", "|---" * 6 + "|"]
    for name, seconds in times.items():
        rates = [flops[name] * result["batch"] / s for s in seconds]
        base = [flops["MAE"] * result["batch"] / s for s in times["MAE"]]
        longer = [s / other for s, other in zip(seconds, times["MAE"], strict=True)]
        faster = [rate / other for rate, other in zip(rates, base, strict=True)]
        step, rate = statistics.median(seconds), statistics.median(rates)
        lines.append(f"| {name} | {flops[name]:.1f} | {step:.3g} | {_spread(longer)} | {rate:.0f} "
                     f"| {_spread(faster)} |")
    return "\n".join(lines) + "\n"


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
