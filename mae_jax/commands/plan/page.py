"""The figures of a plan as one page."""

from typing import Any


def page(config: Any, f: dict[str, Any]) -> str:
    """Returns the figures as one page."""
    m, d = config.model, config.method
    size = "x".join(map(str, config.data.image_size))
    what = f"{d.name}, width {m.width}, depth {m.depth}, {m.heads} heads, patches of {'x'.join(map(str, m.patch))}"
    if "decoder_depth" in d:
        what += f", decoder {d.decoder_depth} x {d.decoder_width}"
    devices = f"{f['devices']} simulated"
    if f["chips"]:
        devices = f"{f['target']}: {f['devices']} devices ({f['device_kind']}), chips {f['chips']}, hosts {f['hosts']}"
    lines = [
        f"recipe      {what}; images of {size}",
        f"            batch {config.batch_size:,}; {config.train.duration} of {f['examples']:,} examples, "
        f"{f['steps']:,} steps; remat {m.remat}, {'layers in a loop' if m.scan else 'unrolled'}",
        f"devices     {devices}; mesh {', '.join(f'{axis} {n}' for axis, n in f['mesh'].items())}",
        f"parameters  {f['parameters']:,}",
        "", *_memory(f), "", *_work(f), "", *_time(f),
        f"({'compiled before' if f['cached'] else 'compiled'} in {f['compile_seconds']:.0f} s)",
    ]
    return "\n".join(lines)


def _memory(f: dict[str, Any]) -> list[str]:
    names = {"parameters": "parameters", "optimizer": "optimizer, averages", "extras": "extras", "batch": "batch",
             "temporaries": "temporaries (compiler)"}
    lines = ["memory per device, GiB"]
    lines += [f"  {title:<24}{f[key + '_gib']:8.3f}" for key, title in names.items() if f[key + "_gib"]]
    if f["hbm_gib_per_core"]:
        limit = f" of {f['hbm_limit_gib']:.0f}" if f["hbm_limit_gib"] else ""
        lines.append(f"  {'total (compiler)':<24}{f['hbm_gib_per_core']:8.3f}{limit}")
    answer = {True: "yes", False: "no", None: "not known for simulated devices"}[f["fits"]]
    return [*lines, f"  fits: {answer}{_short(f['short'])}"]


def _short(short: dict[str, Any] | None) -> str:
    if not short:
        return ""
    if "error" in short:
        return f" ({short['error']})"
    return f" (the compiler needs {short['needed'] / 2**30:.2f} GiB and has {short['available'] / 2**30:.2f})"


def _work(f: dict[str, Any]) -> list[str]:
    """Returns FLOPs, bytes and collectives of one step."""
    lines = ["work per device and step",
             f"  FLOPs, model's matrix products {f['model_flops_per_core'] / 1e12:10.3f} T"]
    if f["flops_per_core"]:
        lines += [f"  FLOPs, compiler's count        {f['flops_per_core'] / 1e12:10.3f} T",
                  f"  memory read and written        {f['bytes_per_core'] / 1e9:10.3f} GB"]
    if f["unpriced"]:
        lines.append(f"  not in these counts, or once: {', '.join(f['unpriced'])}")
    if not f["collectives"]:
        return [*lines, f"  collectives: {'not known' if f['collectives'] is None else 'none'}"]
    lines += ["", f"  {'collective':<20}{'dtype':<7}{'group':>6}{'count':>7}{'MB':>11}{'MB sent':>11}{'ms':>9}"]
    for row in f["collectives"]:
        time = "" if row["seconds"] is None else f"{row['seconds'] * 1e3:.3f}"
        lines.append(f"  {row['kind']:<20}{row['dtype']:<7}{row['group_size']:>6}{row['count']:>7}"
                     f"{row['bytes'] / 1e6:>11.2f}{row['bytes_sent'] / 1e6:>11.2f}{time:>9}")
    return lines


def _time(f: dict[str, Any]) -> list[str]:
    """Returns the estimate, or why there is none."""
    if not f["estimated_step_seconds"]:
        return [f"no time: {f['no_time_because']}"]
    return [
        "estimates: operations and links at full speed, no waiting, nothing overlapped",
        f"  step            {f['estimated_step_seconds']:.4f} s = compiler {f['compiler_seconds']:.4f} + communication "
        f"{f['communication_seconds']:.4f}",
        f"  images          {f['images_per_sec']:,.0f} /s, {f['images_per_sec'] / f['devices']:,.1f} per device; "
        f"MFU {f['mfu']:.1%} of {f['peak_flops_per_core'] / 1e12:g} TFLOP/s",
        f"  recipe          {f['hours']:,.2f} hours, {f['core_hours']:,.0f} device-hours",
        f"  each host feeds {f['images_per_sec_per_host']:,.0f} images/s, "
        f"{f['input_bytes_per_sec_per_host'] / 1e6:,.0f} MB/s to its devices",
    ]
