"""The page of a plan: a verdict, then memory, work and time of a step."""

import math
from typing import Any

from mae_jax.errors import pluralize

LAUNCH = 3e-6  # approximate seconds per kernel launch


def page(config: Any, f: dict[str, Any], price: float | None = None) -> str:
    """Returns the page for the figures `f` of `cost.figures`; `price` per device-hour adds the cost of the recipe."""
    m, d = config.model, config.method
    image = "x".join(map(str, config.data.image_size))
    what = f"{d.name}, width {m.width}, depth {m.depth}, {m.heads} heads, patches of {'x'.join(map(str, m.patch))}"
    if "decoder_depth" in d:
        what += f", decoder {d.decoder_depth} x {d.decoder_width}"
    devices = f"{f['devices']} simulated"
    if f["chips"]:
        chips = "" if f["kernels"] else f"{pluralize(f['chips'], 'chip')}, "
        devices = (f"{f['target']}: {pluralize(f['devices'], 'device')} ({f['device_kind']}), {chips}"
                   f"{pluralize(f['hosts'], 'host')}")
    lines = [
        verdict(f, price), "",
        f"recipe      {what}; images of {image}",
        f"            batch {config.batch_size:,}; {config.train.duration} of {f['examples']:,} examples, "
        f"{f['steps']:,} steps; remat {m.remat}, {'layers in a loop' if m.scan else 'unrolled'}",
        f"devices     {devices}; mesh {', '.join(f'{axis} {n}' for axis, n in f['mesh'].items())}",
        f"parameters  {f['parameters']:,}",
        "", *_memory(f), "", *_work(f), "", *_time(f),
        f"({'compiled before' if f['cached'] else 'compiled'} in {digits(f['compile_seconds'])} s)",
    ]
    return "\n".join(lines)


def verdict(f: dict[str, Any], price: float | None = None) -> str:
    """Returns one line: whether the step fits, duration and cost of the recipe, and the throughput its input needs."""
    if f["fits"] is None:
        return "simulated devices: neither a time, nor whether it fits"
    if not f["fits"]:
        needed = f["hbm_gib_per_core"]
        how = f"needs {digits(needed)} GiB of a device that has {digits(f['hbm_limit_gib'])}" if needed else "no room"
        return f"does not fit: {how}; a smaller batch_size, train.accumulate, model.remat=full or mesh.fsdp needs less"
    fits = "fits"
    if f["memory_fraction"]:
        fits += f" with XLA_PYTHON_CLIENT_MEM_FRACTION={f['memory_fraction']:g} in the environment"
    if not f["estimated_step_seconds"]:
        return f"{fits}; no time: {f['no_time_because']}"
    cost = "" if price is None else f", {money(f['core_hours'] * price)} at {price:g} per device-hour"
    cores = f", about {math.ceil(f['input_cores_per_host'])} of its cores" if f["input_cores_per_host"] else ""
    rate = digits(f["images_per_sec_per_host"])
    return f"{fits}; {duration(f['hours'])}{cost}; the input must make {rate} images/s per host{cores}"


def digits(value: float, count: int = 3) -> str:
    """Returns a number with `count` significant digits, or all digits before the point: 12,345, 12.3, 0.00123."""
    if value == 0 or abs(value) >= 10**count - 0.5:
        return f"{value:,.0f}"
    places = max(count - 1 - math.floor(math.log10(abs(value))), 0)
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def size(nbytes: float, base: int = 1000) -> str:
    """Returns a number of bytes in a fitting unit: '1.31 GB', '4 B'; with base 1024 '1.31 GiB'."""
    units = ("B", "kB", "MB", "GB", "TB") if base == 1000 else ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units[:-1]:
        if nbytes < base:
            return f"{digits(nbytes, 4)} {unit}"
        nbytes /= base
    return f"{digits(nbytes, 4)} {units[-1]}"


def duration(hours: float) -> str:
    """Returns '7.8 hours', '3.2 minutes' or '4.1 seconds'."""
    for unit, length in (("hours", 1.0), ("minutes", 60.0)):
        if hours * length >= 1:
            return f"{hours * length:,.1f} {unit}"
    return f"{digits(hours * 3600)} seconds"


def seconds(value: float) -> str:
    """Returns '1.23 s', '1.23 ms', '1.23 us' or '1.23 ns'."""
    return next(f"{digits(value * scale)} {unit}" for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6), ("ns", 1e9))
                if value * scale >= 1 or unit == "ns" or not value)


def money(value: float) -> str:
    """Returns an amount as '1,234.50'; below 1 with three significant digits."""
    return f"{value:,.2f}" if value >= 1 else digits(value)


def _memory(f: dict[str, Any]) -> list[str]:
    names = {"parameters": "parameters", "optimizer": "optimizer, averages", "extras": "extras", "batch": "batch",
             "temporaries": "temporaries (compiler)"}
    lines = ["memory per device"]
    lines += [f"  {title:<24}{size(f[key + '_gib'] * 2**30, 1024):>10}" for key, title in names.items()
              if f[key + "_gib"]]
    if f["hbm_gib_per_core"]:
        limit = f" of {digits(f['hbm_limit_gib'])} GiB" if f["hbm_limit_gib"] else ""
        lines.append(f"  {'total (compiler)':<24}{size(f['hbm_gib_per_core'] * 2**30, 1024):>10}{limit}")
    answer = {True: "yes", False: "no", None: "not known for simulated devices"}[f["fits"]]
    if f["memory_fraction"]:
        answer += (f", but in more than the 75 % that JAX takes by itself: set XLA_PYTHON_CLIENT_MEM_FRACTION="
                   f"{f['memory_fraction']:g}")
    return [*lines, f"  fits: {answer}{_short(f['short'])}"]


def _short(short: dict[str, Any] | None) -> str:
    if not short:
        return ""
    if "error" in short:
        return f" ({short['error']})"
    return f" (the compiler needs {short['needed'] / 2**30:.2f} GiB and has {short['available'] / 2**30:.2f})"


def _work(f: dict[str, Any]) -> list[str]:
    """Returns the lines about FLOPs, bytes, kernels and collectives of one step."""
    lines = ["work per device and step",
             f"  FLOPs, model's matrix products {digits(f['model_flops_per_core'] / 1e12):>10} T"]
    if f["flops_per_core"]:
        lines += [f"  FLOPs, compiler's {'products' if f['kernels'] else 'count   '}     "
                  f"{digits(f['flops_per_core'] / 1e12):>10} T",
                  f"  memory read and written        {size(f['bytes_per_core']):>12}"]
    if f["unpriced"]:
        lines.append(f"  not in these counts, or once: {', '.join(f['unpriced'])}")
    if f["kernels"]:
        if f["workspace_bytes"]:
            lines.append(f"  and workspace lent to libraries, {size(f['workspace_bytes'])}, which takes no time here")
        lines += ["", f"  {'kernels, workspace included':<36}{'count':>7}{'moved':>11}"]
        rows = [*f["kernels"], {"kind": "all", **{key: sum(row[key] for row in f["kernels"])
                                                  for key in ("count", "bytes")}}]
        lines += [f"  {row['kind']:<36}{row['count']:>7,}{size(row['bytes']):>11}" for row in rows]
    if not f["collectives"]:
        return [*lines, f"  collectives: {'not known' if f['collectives'] is None else 'none'}"]
    lines += ["", f"  {'collective':<20}{'dtype':<7}{'group':>6}{'count':>7}{'bytes':>11}{'sent':>11}{'time':>11}"]
    for row in f["collectives"]:
        time = "" if row["seconds"] is None else seconds(row["seconds"])
        lines.append(f"  {row['kind']:<20}{row['dtype']:<7}{row['group_size']:>6}{row['count']:>7}"
                     f"{size(row['bytes']):>11}{size(row['bytes_sent']):>11}{time:>11}".rstrip())
    return lines


def _roofline(found: dict[str, Any] | None) -> list[str]:
    """Returns the line about the roofline; [] without one."""
    if not found:
        return []
    rates = (f"{found['product_rate'] / 1e12:.3g} TFLOP/s", f"{found['memory_rate'] / 1e12:.3g} TB/s")
    assumed = f" ({' and '.join(found['assumed'])} not measured on this card)" if found["assumed"] else ""
    return [f"roofline, of these counts and no time of a step: products {seconds(found['product_seconds'])} at "
            f"{rates[0]}, memory {seconds(found['memory_seconds'])} at {rates[1]}{assumed}"]


def _time(f: dict[str, Any]) -> list[str]:
    """Returns the lines about the time estimate, or about the reason why there is none."""
    if not f["estimated_step_seconds"]:
        return [f"no time: {f['no_time_because']}", *_roofline(f["roofline"])]
    lines = ["estimates: operations and links at full speed, no waiting, nothing overlapped"]
    step, sent = f["estimated_step_seconds"], f["communication_seconds"]
    if f["kernels"]:
        launches = sum(row["count"] for row in f["kernels"])
        lines = [f"estimates: memory at {f['memory_rate'] / 1e12:.3g} TB/s, products at "
                 f"{f['product_rate'] / 1e12:.3g} TFLOP/s, links at full speed, nothing overlapped, and no launches",
                 f"  (of {launches:,} kernels, about {seconds(launches * LAUNCH)} where no CUDA graph holds them)"]
        if f["assumed"]:
            lines.append(f"  not measured on this card: {' and '.join(f['assumed'])}; the share of its datasheet that "
                         "an H200 reaches")
        parts = f"memory {f['memory_seconds']:.4g} + products {f['product_seconds']:.4g}"
    else:
        parts = f"compiler {f['compiler_seconds']:.4g}"
    feeds = (f"  each host feeds {digits(f['images_per_sec_per_host'])} images/s, "
             f"{size(f['input_bytes_per_sec_per_host'])}/s to its devices")
    if f["input_cores_per_host"]:
        feeds += (f"\n                  {digits(f['input_cores_per_host'])} cores, of which each makes "
                  f"{f['input_images_per_sec_per_core']} images/s of JPEGs of 500 x 375 (docs/performance.md)")
    return [
        *lines,
        f"  step            {step:.4g} s = {parts} + communication {sent:.4g}",
        f"  images          {digits(f['images_per_sec'])} /s, {digits(f['images_per_sec'] / f['devices'])} per device; "
        f"MFU {f['mfu']:.1%} of {f['peak_flops_per_core'] / 1e12:g} TFLOP/s",
        f"  recipe          {digits(f['hours'])} hours, {digits(f['core_hours'])} device-hours",
        feeds,
    ]
