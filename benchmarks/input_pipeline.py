"""The input pipeline against a torchvision loader that does the same work, side by side.

  python benchmarks/input_pipeline.py --threads=2 --rounds=5

Work: 500 x 375 photographs as JPEGs of about 100 kB, random resized crop (0.2 to 1, bicubic, antialiased) to 224 x 224
and flip. Ours ends in permuted uint8 patches (normalisation is done on the device), torchvision's in normalised float32
tensors. Our threads and its workers are alike many. The arms take turns, each in a process of its own; what counts is
images per second of processor time, so that neighbours on the machine disturb little. Needs torch and torchvision.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ARMS = ("ours exact", "ours fast", "torchvision")
PICTURES, HEIGHT, WIDTH, QUALITY = 256, 375, 500, 97
TARGET, BATCH = 224, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESULTS = Path(__file__).parent / "results" / "input_pipeline.json"


def make_pictures(folder: Path) -> float:
    """Writes cuts of installed photographs; returns their mean size in bytes."""
    from mae_jax.data.sources import photo_crops

    names = ("chelsea", "china", "coffee", "grass", "gravel", "hubble_deep_field", "ihc", "motorcycle_left")
    paths = [path for path in photo_crops._paths() if path.stem in names]
    draws, sizes = np.random.default_rng(0), []
    for i in range(PICTURES):
        photograph = Image.open(paths[i % len(paths)]).convert("RGB")
        scale = draws.uniform(0.8, 1.0) * min(photograph.width / WIDTH, photograph.height / HEIGHT)
        w, h = scale * WIDTH, scale * HEIGHT
        left, top = draws.uniform(0, photograph.width - w), draws.uniform(0, photograph.height - h)
        cut = photograph.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
        cut.save(folder / f"{i:04d}.jpg", quality=QUALITY)
        sizes.append((folder / f"{i:04d}.jpg").stat().st_size)
    return statistics.mean(sizes)


def processor_time() -> float:
    """Returns seconds of processor time of this process and of those it has waited for."""
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def run_ours(folder: str, resize: str, threads: int, images: int) -> dict[str, float]:
    from mae_jax import config, data
    from mae_jax.methods.mae import MAE

    c = config.default()
    c.batch_size = BATCH
    c.data.update({"source": "folder", "path": folder, "eval_split": "", "resize": resize, "threads": threads})
    method = MAE(config.resolved(c), data.NO_DATA)
    batches = data.OpenedData(c).batches(method.batch_spec(), method.patch_order()).train(0)
    for _ in range(4):  # fills what is made ahead, so that as much is made while measuring as is taken
        next(batches)
    begin, busy = time.monotonic(), processor_time()
    for _ in range(images // BATCH):
        next(batches)
    return {"images": images // BATCH * BATCH, "wall": time.monotonic() - begin, "cpu": processor_time() - busy}


def run_torchvision(folder: str, workers: int, images: int) -> dict[str, float]:
    import torch

    files, transform = sorted(Path(folder).iterdir()), torch_transform()

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return images // BATCH * BATCH

        def __getitem__(self, i: int) -> torch.Tensor:
            with open(files[i % len(files)], "rb") as file:
                return transform(Image.open(file).convert("RGB"))

    torch.set_num_threads(1)
    begin, busy = time.monotonic(), processor_time()
    loader = torch.utils.data.DataLoader(Pictures(), BATCH, shuffle=True, num_workers=workers)
    count = sum(len(batch) for batch in loader)
    wall = time.monotonic() - begin
    del loader  # its processes have ended with the loop: their time now counts
    return {"images": count, "wall": wall, "cpu": processor_time() - busy}


def torch_transform() -> Callable[[Image.Image], Any]:
    """Returns torchvision's transforms as MAE's training uses them."""
    transforms = import_torchvision().transforms
    return transforms.Compose([
        transforms.RandomResizedCrop(TARGET, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def import_torchvision() -> Any:
    """Imports torchvision, also where its compiled operators do not fit the installed (CPU) build of torch."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):  # it registers shapes for these on import; none of our calls uses them
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    torchvision.kept_alive = library
    return torchvision


def child(arm: str, folder: str, threads: int, images: int) -> dict[str, float]:
    """Runs one arm in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, "--arm", arm, "--folder", folder, "--threads", str(threads), "--images",
               str(images)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{arm} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summarize(rounds: list[dict[str, dict[str, float]]], threads: int, size: float) -> dict:
    """Returns the table: medians over rounds of images per second, per core and by the clock."""
    arms = {}
    for arm in ARMS:
        per_core = [r[arm]["images"] / r[arm]["cpu"] for r in rounds]
        ratios = [per / (r["torchvision"]["images"] / r["torchvision"]["cpu"])
                  for per, r in zip(per_core, rounds, strict=True)]
        arms[arm] = {
            "images_per_second_per_core": round(statistics.median(per_core), 1),
            "lowest_and_highest": [round(min(per_core), 1), round(max(per_core), 1)],
            "images_per_second": round(statistics.median(r[arm]["images"] / r[arm]["wall"] for r in rounds), 1),
            "times_torchvision_per_core": round(statistics.median(ratios), 3),
        }
    versions = {name: metadata.version(name) for name in ("pillow", "torch", "torchvision", "numpy")}
    return {"arms": arms, "rounds": len(rounds), "threads": threads, "cores": os.cpu_count(), "jpeg_bytes": round(size),
            "processor": platform.processor() or platform.machine(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2048, help="per arm and round")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm == "torchvision":
        print(json.dumps(run_torchvision(args.folder, args.threads, args.images)))
    elif args.arm:
        print(json.dumps(run_ours(args.folder, args.arm.split()[1], args.threads, args.images)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            size = make_pictures(Path(folder))
            rounds = [{arm: child(arm, folder, args.threads, args.images) for arm in ARMS} for _ in range(args.rounds)]
        result = summarize(rounds, args.threads, size)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
