"""Ways to find the K-th largest score of each query: bisection over the bits, lax.top_k, or a sort. All are exact.

  python benchmarks/top_k.py                            (this machine's first device)
  python benchmarks/top_k.py --topology=v3:2x2          (the TPU compiler's own estimate, on a machine without a TPU)

The scores are those of one block of ViT-B at batch 8 in mixed sequences of four: [2, 12, 196, 196], K = 49. For
comparison, the forward pass of attention over the same scores without a choice. Writes
benchmarks/results/top_k_<device>.{json,md}. The compiler's estimate counts a loop once, so bisection is unrolled for
it. It seems to price only the bytes of a sort, so it does not show which is faster on a TPU.
"""

import argparse
import functools
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from mae_jax.ops import homologous_attention
from mae_jax.ops.attention import attention

RESULTS = Path(__file__).parent / "results"
SHAPE, KEEP, WIDTH = (2, 12, 196, 196), 49, 768
ROUNDS = 15


def unrolled(scores: jax.Array) -> jax.Array:
    """Returns what `_bisected` does, without its loop."""
    ordered = homologous_attention._in_order(scores)
    found = jnp.full((*scores.shape[:-1], 1), homologous_attention.LOWEST, jnp.int32)
    for number in range(homologous_attention.BITS):
        candidate = found ^ jnp.left_shift(jnp.int32(1), homologous_attention.BITS - 1 - number)
        found = jnp.where((ordered >= candidate).sum(-1, keepdims=True, dtype=jnp.int32) >= KEEP, candidate, found)
    return jax.lax.bitcast_convert_type(homologous_attention._flipped(found), jnp.float32)


WAYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "bisection": functools.partial(homologous_attention._bisected, KEEP),
    "bisection, unrolled": unrolled,
    "lax.top_k": lambda scores: jax.lax.top_k(scores, KEEP)[0][..., -1:],
    "sort": lambda scores: jnp.sort(scores, -1)[..., -KEEP, None],
    "sort of integers": functools.partial(homologous_attention._sorted, KEEP),
}


def plain(q: jax.Array) -> jax.Array:
    """Returns attention without a choice of keys."""
    return attention(q, q, q, SHAPE[1])


def measured() -> tuple[str, dict[str, list[float]]]:
    """Returns the device, and way → seconds of alternating rounds; raises where two ways disagree."""
    scores = jax.random.normal(jax.random.key(0), SHAPE)
    q = jax.random.normal(jax.random.key(1), (SHAPE[0], SHAPE[2], WIDTH))
    calls = {name: (jax.jit(way), scores) for name, way in WAYS.items()} | {"attention": (jax.jit(plain), q)}
    found = [call(x) for name, (call, x) in calls.items() if name in WAYS]
    if not all((other == found[0]).all() for other in found):
        raise SystemExit("the ways disagree")
    times: dict[str, list[float]] = {name: [] for name in calls}
    jax.block_until_ready(calls["attention"][0](q))
    for _ in range(ROUNDS):
        for name, (call, x) in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call(x))
            times[name].append(time.perf_counter() - began)
    return jax.devices()[0].device_kind, times


def estimated(topology: str) -> tuple[str, dict[str, list[float]]]:
    """Returns the same of the TPU compiler's estimates, one figure each."""
    from mae_jax.commands.plan.tpu import devices

    device = devices(topology)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    calls = {name: (way, SHAPE) for name, way in WAYS.items() if name != "bisection"}
    calls["attention"] = (plain, (SHAPE[0], SHAPE[2], WIDTH))
    times = {}
    for name, (call, shape) in calls.items():
        argument = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        cost = jax.jit(call).lower(argument).compile().cost_analysis()
        times[name] = [cost["optimal_seconds"]]
    return f"{device.device_kind}, estimate", times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="", help="as of `python -m mae_jax plan`")
    options = parser.parse_args()
    device, times = estimated(options.topology) if options.topology else measured()
    lines = [f"Scores {list(SHAPE)}, K = {KEEP}, {device}; median (least to most).", "", "| | ms |", "|---|---|"]
    for name, seconds in times.items():
        low, middle, high = (1e3 * f(seconds) for f in (min, statistics.median, max))
        lines.append(f"| {name} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
    stem = RESULTS / f"top_k_{re.sub('[^a-z0-9]+', '_', device.lower())}"
    stem.with_suffix(".json").write_text(json.dumps({"device": device, "seconds": times}, indent=1) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
