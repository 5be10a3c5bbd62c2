"""Throughput of `mae_jax embed`, compared with its input alone and its forward pass alone.

  python benchmarks/embed.py --images=10000 --size=S

On a CPU both share the cores, so the upper bound of images per second is 1 / (1 / input + 1 / forward). On an
accelerator they overlap, and the bound is the slower one. The figure is the fraction of this bound that `embed`
reaches, including the writing of its file. The encoder is a ViT with random parameters; images are JPEGs of 500 x 375
pixels, cropped from installed photographs. The arms alternate, once per round; medians are printed.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from mae_jax import methods
from mae_jax.config import default, vit
from mae_jax.data import NO_DATA
from mae_jax.data.sources import photo_crops
from mae_jax.inference import embedding, parts, passes
from mae_jax.inference.encoder import Encoder, for_devices
from mae_jax.inference.parts import Part
from mae_jax.methods.base import Method
from mae_jax.runtime import sharding

HEIGHT, WIDTH, QUALITY, DISTINCT = 375, 500, 90, 256


def make_images(folder: Path, count: int) -> None:
    """Writes cuts of photographs; beyond DISTINCT ones, links to these."""
    photographs, draws = photo_crops.paths(), np.random.default_rng(0)
    for number in range(min(count, DISTINCT)):
        photograph = Image.open(photographs[number % len(photographs)]).convert("RGB")
        scale = draws.uniform(0.6, 1.0) * min(photograph.width / WIDTH, photograph.height / HEIGHT)
        left, top = (draws.uniform(0, side - scale * cut) for side, cut in
                     ((photograph.width, WIDTH), (photograph.height, HEIGHT)))
        box = (left, top, left + scale * WIDTH, top + scale * HEIGHT)
        cut = photograph.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
        cut.save(folder / f"{number:06d}.jpg", quality=QUALITY)
    for number in range(DISTINCT, count):
        (folder / f"{number:06d}.jpg").hardlink_to(folder / f"{number % DISTINCT:06d}.jpg")


def make_encoder(size: str, batch_size: int) -> Encoder:
    config = default("mae")
    config.model.update(vit(size, patch=16))
    config = for_devices(config, batch_size, jax.devices())
    method = methods.build(config, NO_DATA)
    batch = {name: np.zeros(struct.shape, struct.dtype) for name, struct in Method.eval_spec(method).items()}
    params, extras = jax.jit(method.init)(jax.random.key(0), batch)
    return Encoder(config, params, extras, sharding.make_mesh(config), source=f"random ViT-{size}")


def time_input(encoder: Encoder, part: Part) -> float:
    rows = np.arange(encoder.batch_size)
    began = time.perf_counter()
    for _ in part.batches(Method.eval_spec(encoder.method), rows, deque()):
        pass
    return time.perf_counter() - began


def time_forward(encoder: Encoder, part: Part) -> float:
    """Times the program of `embed` on one batch, as often as it is needed; its outputs reach the host."""
    batch = next(part.batches(Method.eval_spec(encoder.method), np.arange(encoder.batch_size), deque()))
    same = Repeated(part.config, part.split, part.source)
    object.__setattr__(same, "batch", batch)
    function = passes.features_of(encoder, "pool", -1)
    began = time.perf_counter()
    for _ in passes.rows_of(encoder, same, ("embed", "pool", -1), function, lambda images: None):
        pass
    return time.perf_counter() - began


class Repeated(Part):
    """Gives one batch again and again, in place of reading."""

    batch: dict[str, np.ndarray]

    def batches(self, *_: Any, **__: Any) -> Iterator[dict[str, np.ndarray]]:
        return (self.batch for _ in range(-(-self.size // len(self.batch["id"]))))


def time_embed(encoder: Encoder, part: Part) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        embedding.embed(encoder, [part], epath.Path(folder) / "features.parquet")
        return time.perf_counter() - began


def measure(encoder: Encoder, part: Part, rounds: int) -> dict[str, Any]:
    arms = {"input": time_input, "forward": time_forward, "embed": time_embed}
    # Compiles.
    time_forward(encoder, Part(part.config, part.split, part.source.only(np.arange(encoder.batch_size))))
    seconds = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            seconds[name].append(arm(encoder, part))
    speed = {name: part.size / statistics.median(times) for name, times in seconds.items()}
    shared = jax.devices()[0].platform == "cpu"
    best = 1 / (1 / speed["input"] + 1 / speed["forward"]) if shared else min(speed["input"], speed["forward"])
    return {"device": jax.devices()[0].device_kind, "encoder": encoder.source, "images": part.size, "rounds": rounds,
            "batch_size": encoder.batch_size, "images_per_second": speed, "at_best": best,
            "ratio": speed["embed"] / best, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", default="S", help="Ti, S, B, L or H, with patches of 16 pixels at 224")
    parser.add_argument("--batch_size", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", default="", help="a JSON file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), options.images)
        encoder = make_encoder(options.size, options.batch_size)
        found = measure(encoder, parts.of_images(encoder.config, folder, ()), options.rounds)
    if options.to:
        Path(options.to).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "seconds"}, indent=1))


if __name__ == "__main__":
    main()
