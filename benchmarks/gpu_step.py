"""The MAE step on a GPU: the planner's prediction, our measured step, and Hugging Face's ViTMAE, in one run.

  python benchmarks/gpu_step.py --predict                     (no GPU: writes results/gpu_step_predicted.json)
  python benchmarks/gpu_step.py --size=B                      (one H200, 5 minutes; --size=L likewise)
  python benchmarks/gpu_step.py --size=Ti --batches=8 --rounds=1 --peers=hf_eager    (a trial on a CPU)

For each batch size, all in bfloat16 and alternating: our jitted, donating step, and ViTMAE with fused AdamW, eager and
compiled. Bytes moved are reported for the text compiled on the GPU, with autotuning, and for the text compiled without
one. Last, a process with `train.deterministic` checks that six steps, and three steps that are saved, restored and
continued for three more, give bit-identical results.
"""

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PREDICTED = RESULTS / "gpu_step_predicted.json"
BATCHES = {"B": [512, 256], "L": [256, 128]}  # that of the planner, and a neighboring one
CARDS = ("h200:1", "h100:1")
STEPS = 3  # before and after the save


def predict() -> dict[str, dict[str, Any]]:
    """Returns card → size and batch → the planner's figures, from what XLA compiles where no GPU is."""
    import recipes

    from mae_jax.commands.plan import cost

    found: dict[str, dict[str, Any]] = {}
    for card in CARDS:
        target = cost.target(card, 0)
        for size, batches in BATCHES.items():
            for batch in batches:
                config = recipes.mae(size, batch)
                measured = cost.measure(config, target, 1_281_167, "", print)
                plan = cost.figures(config, target, measured, 1_281_167)
                found.setdefault(card, {})[f"{size}, {batch}"] = {
                    "ms": plan["estimated_step_seconds"] * 1e3, "gb": measured["bytes_accessed"] / 1e9,
                    "kernels": sum(row["count"] for row in measured["kernels"]), "gib": plan["hbm_gib_per_core"]}
    return found


def measure(size: str, batches: list[int], rounds: int, peers: list[str]) -> dict[str, Any]:
    """Returns the figures of each batch size, measured on this machine's first device."""
    import gc

    import jax
    import recipes
    import torch
    import torch_mae
    from absl import flags

    from mae_jax.commands.bench.timed_step import TimedStep
    from mae_jax.commands.plan import gpu_cost, gpu_text

    flags.FLAGS(["gpu_step"])
    device = jax.devices()[0].platform
    torch.set_float32_matmul_precision("high")
    rows = []
    for batch in batches:
        timed = TimedStep(recipes.mae(size, batch))
        row: dict[str, Any] = {"model": f"ViT-{size}/16", "batch": batch, "compile_seconds": timed.compile_seconds}
        if device == "gpu":
            kernels = gpu_text.kernels(timed.step.as_text())
            row |= {"kernels": gpu_text.count(kernels),
                    "gb": (gpu_text.moved(kernels) - gpu_cost.workspace(kernels)) / 1e9,
                    "attention": sum(kernel.kind.startswith("__cudnn") for kernel in kernels)}
        contenders = {"mae_jax": functools.partial(_ours, timed)}
        contenders |= {name: torch_mae.CONTENDERS[name] for name in peers}
        figures = torch_mae.compare(timed.config, device, rounds, contenders)
        row |= figures | {"ratios": torch_mae.ratios(figures)}
        row["gflop_per_image"] = timed.flops_per_image / 1e9
        rows.append(row)
        print(json.dumps(row, indent=1), flush=True)
        del timed, contenders
        gc.collect()
        jax.clear_caches()
        torch._dynamo.reset()
        if device == "gpu":
            torch.cuda.empty_cache()
    dtype = "bfloat16" if device == "gpu" else "float32"  # of both, where it is a trial
    return {"machine": torch_mae.machine(device), "dtype": dtype, "rows": rows}


def _ours(timed: Any, config: Any, device: str) -> Callable[[], None]:
    """Returns what a reading of the clock is of, as `torch_mae` makes it of its contenders."""
    from torch_mae import STEPS as AT_ONCE

    def steps() -> None:
        for _ in range(AT_ONCE[device]):
            timed.run(timed.batch)

    return steps


def resumed(size: str) -> dict[str, Any]:
    """Returns whether steps that were interrupted by a save, and read back, end with the bits of unbroken ones."""
    import jax
    import numpy as np
    import recipes

    from mae_jax.commands.bench.timed_step import TimedStep
    from mae_jax.param_tree import flatten
    from mae_jax.storage.checkpoint import Checkpoints

    config = recipes.mae(size, 8 if size == "Ti" else 64)
    config.train.deterministic = True
    timed = TimedStep(config)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, 1)
        for step in range(2 * STEPS):
            if step == STEPS:
                checkpoints.save(step, timed.state)
                checkpoints.wait()
            timed.run(timed.batch)
        unbroken = {name: np.asarray(leaf) for name, leaf in flatten(timed.state).items()}
        timed.state = checkpoints.restore(timed.state)
        for _ in range(STEPS):
            timed.run(timed.batch)
        checkpoints.close()
    again = {name: np.asarray(leaf) for name, leaf in flatten(timed.state).items()}
    other = [name for name, leaf in unbroken.items() if leaf.tobytes() != again[name].tobytes()]
    return {"device": jax.devices()[0].device_kind, "arrays": len(unbroken), "that_differ": other}


def table(measured: dict[str, Any], size: str) -> str:
    """Returns Markdown: predicted and measured, and the ratios to each peer."""
    card = measured["machine"]["device"]
    key = next((name for name in CARDS if name.split(":")[0].upper() in card.upper()), "")
    predicted = json.loads(PREDICTED.read_text()).get(key, {}) if PREDICTED.exists() else {}
    lines = [f"ViT-{size}/16 MAE on {card}, {measured['dtype']}; `python benchmarks/gpu_step.py --size={size}`. "
             "Predicted by `--predict`, without a GPU.", "",
             "| batch | ms, predicted | ms | images/s | TFLOP/s | GB, predicted | GB | times eager | times compiled |",
             "|---" * 9 + "|"]
    for row in measured["rows"]:
        ours, plan = row["mae_jax"], predicted.get(f"{size}, {row['batch']}", {})
        if not ours:
            lines.append(f"| {row['batch']} | {_shown(plan.get('ms'))} | out of memory |" + " |" * 6)
            continue
        ratio = {name: f"{found['seconds']:.2f}" for name, found in row["ratios"].items()}
        lines.append(
            f"| {row['batch']} | {_shown(plan.get('ms'))} | {ours['seconds'] * 1e3:.1f} | "
            f"{ours['images_per_sec']:,.0f} | {ours['images_per_sec'] * row['gflop_per_image'] / 1e3:.0f} | "
            f"{_shown(plan.get('gb'))} | {_shown(row.get('gb'))} | {ratio.get('hf_eager', '')} | "
            f"{ratio.get('hf_compile', '')} |")
    if bits := measured.get("resume"):
        text = "bit for bit as the unbroken one" if not bits["that_differ"] else \
            f"otherwise than the unbroken one in {len(bits['that_differ'])} of {bits['arrays']} arrays"
        lines += ["", f"A run with `train.deterministic` that was saved and read back went on {text}."]
    return "\n".join(lines) + "\n"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--size", default="B")
    parser.add_argument("--batches", type=int, nargs="+", help="default: the planner's, and a neighboring one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="*", default=["hf_eager", "hf_compile"])
    parser.add_argument("--resume", action="store_true", help="the deterministic resume alone; prints JSON")
    parser.add_argument("--to", type=Path, help="default: benchmarks/results/gpu_step_<size>_<device>.json")
    options = parser.parse_args()
    if options.predict:
        PREDICTED.write_text(json.dumps(predict(), indent=1) + "\n")
        return
    if options.resume:
        print(json.dumps(resumed(options.size)))
        return
    measured = measure(options.size, options.batches or BATCHES[options.size], options.rounds, options.peers)
    device = re.sub("[^a-z0-9]+", "_", measured["machine"]["device"].lower())
    path = options.to or RESULTS / f"gpu_step_{options.size.lower()}_{device}.json"
    write(path, measured, options.size)  # whatever becomes of the rest
    done = subprocess.run([sys.executable, __file__, f"--size={options.size}", "--resume"], capture_output=True,
                          text=True)
    if done.returncode:
        sys.exit(f"the deterministic resume failed:\n{done.stderr[-3000:]}")
    measured["resume"] = json.loads(done.stdout.splitlines()[-1])
    write(path, measured, options.size)
    print(table(measured, options.size))


def write(path: Path, measured: dict[str, Any], size: str) -> None:
    """Writes the figures, and beside them their table."""
    path.write_text(json.dumps(measured, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(measured, size))


if __name__ == "__main__":
    main()
