"""The compiler's estimates for a config's train step on devices that need not be present, and the figures of the page.

`measure` compiles and returns plain values, which a folder may cache; `figures` computes the page's figures from them.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from mae_jax import param_tree, plugins
from mae_jax.commands.plan import collectives, gpu, gpu_cost, tpu
from mae_jax.data import ASSUMED
from mae_jax.durations import Timeline
from mae_jax.errors import UserError, did_you_mean
from mae_jax.runtime import bounded_json, sharding
from mae_jax.storage import paths
from mae_jax.training import throughput
from mae_jax.training.train_step import TrainStep, build

PACKAGE = Path(__file__).parents[2]
# Images per second per core by data.resize and image size, for JPEGs of 500 x 375 pixels, on the faster of two
# processors (docs/performance.md). Other sizes were not measured.
IMAGES_PER_CORE = {("exact", (224, 224)): 517, ("fast", (224, 224)): 763}
TIMES = ("compiler_seconds", "memory_seconds", "product_seconds", "memory_rate", "product_rate", "assumed",
         "communication_seconds", "estimated_step_seconds")  # those that a kind of device lacks are None


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: 'v3:8x8', 'h200:8', or '8 simulated devices'.
      devices: the devices of the topology, or simulated ones.
      chip: the kind of chip or card; None for simulated devices.
    """

    name: str
    devices: list[Any]
    chip: tpu.Chip | gpu.Card | None


def target(topology: str, simulated: int, slices: int = 1) -> Target:
    """Returns the devices of `slices` slices of a topology or, if its name is empty, `simulated` CPU devices.

    Raises:
      UserError: the topology is unknown, or its compiler is missing.
    """
    if found := gpu.parse(topology):
        if slices > 1:
            raise UserError(f"mesh.slices={slices}: GPUs are planned for one host; only TPUs have slices")
        return Target(topology, gpu.devices(topology), found[0])
    if topology:
        if re.split("[:-]", topology)[0] not in tpu.GENERATIONS:
            nearest = did_you_mean(topology.split(":")[0], [*tpu.CHIPS, *gpu.CARDS])
            raise UserError(f"unknown topology {topology!r}; {nearest}; TPUs with the chips along each dimension, as "
                            "v3:8x8 or v4:4x4x4, or by accelerator type, as v5litepod-8; GPUs with how many of a host, "
                            "as h200:8")
        name = f"{slices} slices of {topology}" if slices > 1 else topology
        return Target(name, tpu.devices(topology, slices), tpu.parse(topology)[0])
    return Target(f"{simulated} simulated devices", jax.devices("cpu"), None)


def measure(config: ConfigDict, target: Target, examples: int, cache: str = "",
            progress: Callable[[str], AbstractContextManager[Any]] = nullcontext) -> dict[str, Any]:
    """Compiles the train step, or reads the measurements of the same step from the folder `cache`.

    Args:
      config: a config, whose 'auto' fields are resolved for the target.
      target: the devices to compile for.
      examples: number of training examples per epoch of the schedule.
      cache: a folder; '': none.
      progress: from a text, makes a context that lasts as long as the compilation.

    Returns:
      Plain values, sizes in bytes per device. If memory is too small, 'short' is not None, and the values of a compiled
      step are missing.

    Raises:
      UserError: the config does not fit the devices.
    """
    known = {"config": param_tree.flat(config), "target": target.name, "examples": examples, "versions": versions(),
             "source": _source_digest()}
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]
    named = {"methods": [config.method.name], "optimizers": [config.optim.name]}
    foreign = config.plugins or plugins.used(named)  # the digest does not cover the code of plug-ins
    file = Path(paths.normalized(cache, "--cache")) / f"{key}.json" if cache and not foreign else None
    if file and file.exists():
        with contextlib.suppress(ValueError, OSError):  # an unreadable file is written anew
            stored = bounded_json.parse_object(file.read_bytes())
            if stored.pop("of", None) == bounded_json.as_read(known):
                return stored | {"cached": True}
    program = build(config, ASSUMED._replace(num_train=examples), target.devices)
    what = f"compiling for {target.name}, batch {config.batch_size}"
    with progress(f"{what}, {'layers in a loop' if config.model.scan else 'unrolled: minutes for a large model'}"):
        found = _shapes(program) | _compiled(program, target) | {"cached": False}
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")  # other processes may write the same file
        part.write_text(json.dumps(found | {"of": known}))
        part.rename(file)
    return found


def versions() -> dict[str, str]:
    """Returns the versions of the packages that a compiled step depends on."""
    packages = ("jax", "jaxlib", "libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "flax", "optax")
    names = [name for name in packages if importlib.util.find_spec(name)]
    return {name: importlib.metadata.version(name) for name in names}


def _source_digest() -> str:
    """Returns a digest of the source files that the figures of a compiled step depend on."""
    files = [file for file in sorted(PACKAGE.rglob("*.py"))
             if file.relative_to(PACKAGE).parts[0] not in ("data", "evals", "interop", "storage", "commands")]
    files += [PACKAGE / "data" / name for name in ("info.py", "masking.py")]  # they decide the shapes of the batch
    files += sorted(Path(__file__).parent.glob("*.py"))  # they parse the compiled text
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _shapes(program: TrainStep) -> dict[str, Any]:
    """Returns the values that follow from shapes and shardings alone, without a compilation."""
    state, mesh, config = program.state, program.mesh, program.method.config
    rows = sharding.batch_sharding(mesh).devices_indices_map((config.batch_size,))
    hosts: dict[int, set[tuple[Any, ...]]] = {}
    for device, index in rows.items():
        hosts.setdefault(device.process_index, set()).add(index[0].indices(config.batch_size))
    return {
        "mesh": {axis: size for axis, size in mesh.shape.items()},
        "hosts": len(hosts),
        "rows_per_host": max(sum(stop - start for start, stop, _ in held) for held in hosts.values()),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "parameter_bytes": held(state.params),
        "optimizer_bytes": held((state.opt, state.ema)),
        "extras_bytes": held(state.extras),
        "batch_bytes": held(program.batch),
        "image_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in program.batch.values()) // config.batch_size,
        "model_flops_per_image": throughput.train_flops(program.method),
        "peak_flops": throughput.peak_flops(mesh.devices.flat[0]),
    }


def held(tree: Any) -> int:
    """Returns the bytes per device of a tree of `jax.ShapeDtypeStruct`s with shardings."""
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))


def _compiled(program: TrainStep, target: Target) -> dict[str, Any]:
    if isinstance(target.chip, gpu.Card):
        return gpu_cost.compiled(program, target.chip)
    began = time.monotonic()
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.step.lower(program.state, program.batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"short": _shortage(str(error)), "compile_seconds": time.monotonic() - began}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    text, devices = _text(compiled), list(program.mesh.devices.flat)
    torus = tpu.torus(target.chip, devices) if target.chip else None
    members = len(torus.coords) if torus else len(devices)  # devices of one slice, which the text numbers
    return {
        "short": None,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "total_bytes": (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
                        + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes),
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        "optimal_seconds": cost["optimal_seconds"] + collectives.withheld_seconds(text) if target.chip else None,
        "unpriced": collectives.unpriced(text) if text else ["collectives, since jaxlib cannot read libtpu's text"],
        "collectives": collectives.table(list(collectives.parse(text, members)), torus) if text else None,
        "compile_seconds": time.monotonic() - began,
    }


def _text(compiled: Any) -> str:
    """Returns the HLO text; '' if jaxlib (0.10.2) cannot parse it, as for libtpu (0.0.52) and the chip 7x."""
    try:
        with tpu.quiet_stderr():
            return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return ""


def _shortage(error: str) -> dict[str, float | str]:
    """Returns the bytes that the compiler needed and had; if its error does not name them, its first line."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available \w+ \(([\d.]+)([KMGT])\)", error)
    if not found:
        return {"error": error.splitlines()[0]}
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return {"needed": float(found[1]) * units[found[2]], "available": float(found[3]) * units[found[4]]}


def figures(config: ConfigDict, target: Target, found: dict[str, Any], examples: int) -> dict[str, Any]:
    """Returns the figures of the page: memory in GiB per device, times in seconds, None for unknown values."""
    steps = Timeline.of(config, examples).total
    total = found.get("total_bytes")
    why = _why_no_time(target, found)
    time = _times(target, found) if not why else dict.fromkeys(TIMES)
    step = time["estimated_step_seconds"]
    rate = config.batch_size / step if step else None
    model = found["model_flops_per_image"] * config.batch_size / len(target.devices)
    host = found["rows_per_host"] / step if step else None
    per_core = IMAGES_PER_CORE.get((config.data.resize, tuple(config.data.image_size)))
    return {
        "target": target.name, "devices": len(target.devices), "steps": steps, "examples": examples,
        "chips": _chips(target), "device_kind": target.devices[0].device_kind if target.chip else "cpu",
        **{key: found[key] for key in ("hosts", "mesh", "parameters", "compile_seconds", "cached", "rows_per_host")},
        "parameters_gib": found["parameter_bytes"] / 2**30,
        "optimizer_gib": found["optimizer_bytes"] / 2**30,
        "extras_gib": found["extras_bytes"] / 2**30,
        "batch_gib": found["batch_bytes"] / 2**30,
        "temporaries_gib": found["temporary_bytes"] / 2**30 if total else None,
        "hbm_gib_per_core": (total or found["short"].get("needed", 0)) / 2**30 or None,
        "hbm_limit_gib": target.chip.hbm / 2**30 if target.chip else None,
        **_fit(target, found), "short": found["short"],
        "flops_per_core": found.get("flops"), "model_flops_per_core": model,
        "bytes_per_core": found.get("bytes_accessed"), "peak_flops_per_core": found["peak_flops"],
        "kernels": found.get("kernels"), "workspace_bytes": found.get("workspace_bytes"),
        "collectives": found.get("collectives"), "unpriced": found.get("unpriced", []), "no_time_because": why,
        "roofline": _roofline(target, found, model) if found.get("unpriced") else None, **time, "images_per_sec": rate,
        "mfu": model / step / found["peak_flops"] if step and found["peak_flops"] else None,
        "hours": steps * step / 3600 if step else None,
        "core_hours": steps * step / 3600 * len(target.devices) if step else None,
        "images_per_sec_per_host": host,
        "input_bytes_per_sec_per_host": host * found["image_bytes"] if host else None,
        "input_images_per_sec_per_core": per_core,
        "input_cores_per_host": host / per_core if host and per_core else None,
    }


def _fit(target: Target, found: dict[str, Any]) -> dict[str, Any]:
    """Returns whether the step fits (None: not known), and the fraction of a GPU's memory that JAX must be allowed."""
    if not target.chip or found["short"]:
        return {"fits": False if target.chip else None, "memory_fraction": None}
    needed = found["total_bytes"] / target.chip.hbm
    if isinstance(target.chip, gpu.Card):
        fraction = gpu.TAKEABLE if gpu.TAKEN < needed <= gpu.TAKEABLE else None
        return {"fits": needed <= gpu.TAKEABLE, "memory_fraction": fraction}
    return {"fits": needed <= 1, "memory_fraction": None}


def _chips(target: Target) -> int | None:
    """Returns the number of chips of the devices; None if they are simulated."""
    if isinstance(target.chip, tpu.Chip):
        return len({(getattr(device, "slice_index", 0), *device.coords) for device in target.devices})
    return len(target.devices) if target.chip else None


def _times(target: Target, found: dict[str, Any]) -> dict[str, Any]:
    """Returns the parts of the estimated step time in seconds, and the names of rates that were not measured."""
    communication, parts = sum(row["seconds"] for row in found["collectives"]), dict.fromkeys(TIMES)
    if isinstance(target.chip, gpu.Card):
        copied, products, parts["assumed"] = gpu.rates(target.chip, found["peak_flops"])
        parts |= {"memory_seconds": found["bytes_accessed"] / copied, "product_seconds": found["flops"] / products,
                  "memory_rate": copied, "product_rate": products}
        compute = parts["memory_seconds"] + parts["product_seconds"]
    else:
        compute = parts["compiler_seconds"] = found["optimal_seconds"]
    return parts | {"communication_seconds": communication, "estimated_step_seconds": compute + communication}


def _roofline(target: Target, found: dict[str, Any], model_flops: float) -> dict[str, Any] | None:
    """Returns the two bounds of the roofline, in seconds, and their rates, for a step without a time estimate.

    Neither bound is a step time. None for simulated devices, and if FLOPs or bytes are not known.
    """
    if not target.chip or not found["peak_flops"] or not found.get("bytes_accessed"):
        return None
    memory, products, assumed = gpu.rates(target.chip, found["peak_flops"]) if isinstance(target.chip, gpu.Card) else (
        target.chip.hbm_rate, found["peak_flops"], [])
    flops = max(model_flops, found.get("flops") or 0)
    return {"product_seconds": flops / products, "memory_seconds": found["bytes_accessed"] / memory,
            "product_rate": products, "memory_rate": memory, "assumed": assumed}


def _why_no_time(target: Target, found: dict[str, Any]) -> str:
    """Returns why there is no time estimate; '' if there is one."""
    if not target.chip:
        return "the devices are simulated"
    if found["short"]:
        return "the step does not fit"
    if found["unpriced"]:
        loops = "; model.scan and train.accumulate make loops" if "while" in found["unpriced"] else ""
        return f"the compiler does not price all of: {', '.join(found['unpriced'])}{loops}"
    if isinstance(target.chip, gpu.Card):
        return ""
    return "" if found["optimal_seconds"] > 0 else "the compiler gives none"


def simulate(count: int) -> None:
    """Configures `count` simulated CPU devices, before JAX initializes its own; raises UserError for count < 1."""
    if count < 1:
        raise UserError(f"--devices={count}; write the number of devices to simulate, as --devices=8")
    jax.config.update("jax_num_cpu_devices", count)
