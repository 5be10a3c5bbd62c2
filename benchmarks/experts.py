"""Ways to multiply each image with the kernel of its expert: by groups, by tiles, or image by image.

  python benchmarks/experts.py                        (this machine's first device)
  python benchmarks/experts.py --images=256 --experts 8 32       (one GPU)

Times one product of a mixture in ViT-B's MLP, tokens [B, 50, 768] times kernels [E, 768, 3072], with both gradients.
The same product with a single kernel (`dense`) is the lower bound. Routing is random. Writes
benchmarks/results/experts_<device>.json and .md; times are medians over alternating rounds.
"""

import argparse
import functools
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mae_jax.ops import expert_linear

RESULTS = Path(__file__).parent / "results"
TOKENS, WIDTH, HIDDEN = 50, 768, 3072
TILES = (256, 512, 1024)
ROUNDS = 9


def product(way: str, x: jax.Array, dy: jax.Array, kernel: jax.Array, expert: jax.Array) -> tuple[jax.Array, ...]:
    """Returns y, dx and dkernel."""
    if way == "dense":
        return x @ kernel[0], dy @ kernel[0].T, jnp.einsum("btk,btf->kf", x, dy, preferred_element_type=jnp.float32)
    times, outer = WAYS[way]
    return (times(x, kernel, expert), times(dy, kernel.swapaxes(1, 2), expert),
            outer(len(kernel), jnp.float32, x, dy, expert))


def tiles(rows: int) -> tuple[Callable[..., jax.Array], ...]:
    """Returns the products by tiles of so many rows; the size is read while they are traced."""
    def sized(call: Callable[..., jax.Array], *args: Any) -> jax.Array:
        kept, expert_linear.ROWS_OF_A_TILE = expert_linear.ROWS_OF_A_TILE, rows
        try:
            return call(*args)
        finally:
            expert_linear.ROWS_OF_A_TILE = kept

    return functools.partial(sized, expert_linear._tiled), functools.partial(sized, expert_linear._outer_tiled)


WAYS: dict[str, tuple[Callable[..., jax.Array], ...]] = {
    "by groups (ragged_dot)": (expert_linear._grouped, expert_linear._outer_grouped),
    **{f"by tiles of {rows} rows": tiles(rows) for rows in TILES},
    "image by image": (expert_linear._one_by_one, expert_linear._outer_one_by_one),
}


def measured(images: int, count: int) -> dict[str, list[float]]:
    """Returns way → milliseconds of the rounds; raises where two ways disagree."""
    keys = jax.random.split(jax.random.key(0), 4)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    x = jax.random.normal(keys[0], (images, TOKENS, WIDTH), dtype)
    dy = jax.random.normal(keys[1], (images, TOKENS, HIDDEN), dtype)
    kernel = jax.random.normal(keys[2], (count, WIDTH, HIDDEN), dtype)
    args = x, dy, kernel, jax.random.randint(keys[3], (images,), 0, count)
    calls = {way: jax.jit(functools.partial(product, way)) for way in ("dense", *WAYS)}
    first = {way: jax.block_until_ready(call(*args)) for way, call in calls.items()}
    for way in WAYS:
        for ours, theirs in zip(first[way], first["image by image"], strict=True):
            error = jnp.abs(ours.astype(jnp.float32) - theirs.astype(jnp.float32)).max()
            assert error <= 0.02 * jnp.abs(theirs).max(), (way, error)
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(ROUNDS):
        for way, call in calls.items():
            began = time.perf_counter()
            for _ in range(3):
                result = call(*args)
            jax.block_until_ready(result)
            times[way].append((time.perf_counter() - began) / 3 * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--experts", type=int, nargs="+", default=[8])
    options = parser.parse_args()
    device = jax.devices()[0].device_kind
    results = {count: measured(options.images, count) for count in options.experts}
    lines = [f"{options.images} images of {TOKENS} tokens, {WIDTH} to {HIDDEN}, {device}; milliseconds of the product "
             f"and its two gradients, median of {ROUNDS} alternating rounds (least to most).", "",
             "| way | " + " | ".join(f"{count} experts" for count in results) + " |", "|---" * (len(results) + 1) + "|"]
    for way in ("dense", *WAYS):
        shown = [f"{statistics.median(times[way]):.2f} ({min(times[way]):.2f} to {max(times[way]):.2f})"
                 for times in results.values()]
        lines.append(f"| {way} | {' | '.join(shown)} |")
    stem = RESULTS / f"experts_{re.sub('[^a-z0-9]+', '_', device.lower())}"
    stem.with_suffix(".json").write_text(json.dumps({"device": device, "images": options.images, "ms": results}) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
