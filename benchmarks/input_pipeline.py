"""The input pipeline compared with a torchvision loader that does the same work, by number of worker processes.

  python benchmarks/input_pipeline.py --workers=1,2 --rounds=5
  python benchmarks/input_pipeline.py --workers=1,2,4,8,16 --arms="ours exact,ours fast" --rounds=3   # without torch

Work: 500 x 375 photographs as JPEGs of about 100 kB, random resized crop (0.2 to 1, bicubic, antialiased) to 224 x 224
and flip. Ours ends in permuted uint8 patches (the device normalizes them), torchvision's in normalized float32 tensors.
Both have the same number of worker processes; the arms with threads have as many threads. The arms alternate, each in
its own process. Reported are images per second of wall-clock time, in the steady state, and per CPU second, which other
processes on the machine disturb less. With --arms, neither TensorFlow nor torch is needed.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ARMS = ("ours exact", "ours fast", "ours graph", "torchvision")
MORE_ARMS = ("threads exact", "threads fast", "threads graph")
WARM = 6  # batches before the clock starts: then as much is made while measuring as is taken
PICTURES, HEIGHT, WIDTH, QUALITY = 256, 375, 500, 97
TARGET, BATCH = 224, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESULTS = Path(__file__).parent / "results" / "input_pipeline.json"


def make_pictures(folder: Path) -> float:
    """Writes cuts of installed photographs; returns their mean size in bytes."""
    from mae_jax.data.sources import photo_crops

    names = ("chelsea", "china", "coffee", "grass", "gravel", "hubble_deep_field", "ihc", "motorcycle_left")
    paths = [path for path in photo_crops.paths() if path.stem in names]
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


def descendants() -> dict[int, list[str]]:
    """Returns process id → fields of /proc/<id>/stat after the name, of this process and those it started (Linux)."""
    stats = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats[int(file.parent.name)] = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
    ours = {os.getpid()}
    while more := {pid for pid, fields in stats.items() if int(fields[1]) in ours} - ours:
        ours |= more
    return {pid: stats[pid] for pid in ours}


def processor_time() -> float:
    """Returns seconds of processor time of this process and of all that it started and that live (Linux)."""
    return sum(int(fields[11]) + int(fields[12]) for fields in descendants().values()) / os.sysconf("SC_CLK_TCK")


def timed(batches: Iterator[Any], images: int) -> dict[str, float]:
    """Takes so many images, after some batches that warm up; returns what that took."""
    for _ in range(WARM):
        next(batches)
    begin, busy = time.monotonic(), processor_time()
    for _ in range(images // BATCH):
        next(batches)
    return {"images": images // BATCH * BATCH, "wall": time.monotonic() - begin, "cpu": processor_time() - busy}


def run_ours(folder: str, resize: str, workers: int, threads: int, images: int) -> dict[str, float]:
    from mae_jax import config, data
    from mae_jax.methods.mae import MAE

    c = config.default()
    c.batch_size = BATCH
    c.data.update({"source": "folder", "path": folder, "eval_split": "", "resize": resize, "workers": str(workers),
                   "threads": threads})
    method = MAE(config.resolved(c), data.NO_DATA)
    return timed(data.OpenedData(c).batches(method.batch_spec(), method.patch_order()).train(0), images)


def run_torchvision(folder: str, workers: int, images: int) -> dict[str, float]:
    import torch

    files, transform = sorted(Path(folder).iterdir()), torch_transform()

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return images + (WARM + 4 * workers) * BATCH  # so that the last ones taken are not the last ones made

        def __getitem__(self, i: int) -> torch.Tensor:
            with open(files[i % len(files)], "rb") as file:
                return transform(Image.open(file).convert("RGB"))

    torch.set_num_threads(1)
    return timed(iter(torch.utils.data.DataLoader(Pictures(), BATCH, shuffle=True, num_workers=workers)), images)


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


def run(arm: str, folder: str, workers: int, images: int) -> dict[str, float]:
    """Runs one arm in this process."""
    if arm == "torchvision":
        return run_torchvision(folder, workers, images)
    who, resize = arm.split()
    return run_ours(folder, resize, workers if who == "ours" else 0, 0 if who == "ours" else workers, images)


def child(arm: str, folder: str, workers: int, images: int) -> dict[str, float]:
    """Runs one arm in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, "--arm", arm, "--folder", folder, "--workers", str(workers), "--images",
               str(images)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{arm} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{arm}, {workers}: {found['images'] / found['wall']:.0f} images/s", file=sys.stderr, flush=True)
    return found


def summarize(rounds: list[dict[tuple[str, int], dict[str, float]]], load: float, size: float) -> dict[str, Any]:
    """Returns the table: medians over rounds; ratios are those within a round."""
    def speeds(key: tuple[str, int], by: str = "wall") -> list[float]:
        return [each[key]["images"] / each[key][by] for each in rounds]

    def ratio(key: tuple[str, int], to: tuple[str, int]) -> float | None:
        if to not in rounds[0]:
            return None
        return round(statistics.median(a / b for a, b in zip(speeds(key), speeds(to), strict=True)), 3)

    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for arm, workers in rounds[0]:
        found = speeds((arm, workers))
        arms.setdefault(arm, {})[workers] = {
            "images_per_second": round(statistics.median(found), 1),
            "lowest_and_highest": [round(min(found), 1), round(max(found), 1)],
            "images_per_second_per_core": round(statistics.median(speeds((arm, workers), "cpu")), 1),
            "times_one_worker": ratio((arm, workers), (arm, 1)),
            "times_torchvision": ratio((arm, workers), ("torchvision", workers)),
        }
    names = ["pillow", "numpy", *(["torch", "torchvision"] if "torchvision" in arms else [])]
    tensorflow = "tensorflow" if importlib.util.find_spec("tensorflow") else ""
    names += [each for each in metadata.packages_distributions().get(tensorflow, []) if each.startswith("tensorflow")
              ][:1] if any("graph" in arm or "fast" in arm for arm in arms) else []
    return {"arms": arms, "rounds": len(rounds), "cores": os.cpu_count(), "load_average_before": round(load, 1),
            "jpeg_bytes": round(size), "processor": platform.processor() or platform.machine(),
            "versions": {name: metadata.version(name) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default=f"1,{os.cpu_count()}", help="counts, by commas")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"by commas, of {', '.join(ARMS + MORE_ARMS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2048, help="per worker, arm and round")
    parser.add_argument("--to", type=Path, default=RESULTS)
    parser.add_argument("--arm", choices=ARMS + MORE_ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    counts = [int(count) for count in args.workers.split(",")]
    if args.arm:
        print(json.dumps(run(args.arm, args.folder, counts[0], args.images)))
        return
    load, arms = os.getloadavg()[0], args.arms.split(",")
    with tempfile.TemporaryDirectory() as folder:
        size = make_pictures(Path(folder))
        rounds = [{(arm, count): child(arm, folder, count, args.images * count) for count in counts for arm in arms}
                  for _ in range(args.rounds)]
    result = summarize(rounds, load, size)
    args.to.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
