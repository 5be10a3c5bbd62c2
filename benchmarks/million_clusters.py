"""Clusters a million features in bounded memory, compared with scikit-learn's MiniBatchKMeans.

  python benchmarks/million_clusters.py
  python benchmarks/million_clusters.py --points=100000 --clusters=64         (a trial)

The features are synthetic: 768 dimensions, around 400 directions of very different frequency, written to disk in
chunks. Ours is `spherical_kmeans.balanced_kmeans`: k-means to convergence, then balancing until the largest cluster is
at most 3 times the smallest. Theirs is MiniBatchKMeans on the same unit vectors, with initial centroids from the same
sample and as many passes over the chunks (partial_fit) as ours took for k-means; it does not balance. Memory is the
peak of each process, which does nothing else, minus its memory before the first chunk; a last pass that only counts is
excluded. Writes benchmarks/results/million_clusters.json.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.ops import spherical_kmeans

RESULTS = Path(__file__).parent / "results"
WIDTH, DIRECTIONS, CHUNK = 768, 400, 16_384


def write(folder: Path, points: int) -> None:
    """Writes chunks of unit vectors."""
    draws = np.random.default_rng(0)
    middles = draws.normal(size=(DIRECTIONS, WIDTH)).astype(np.float32)
    weights = 1 / np.arange(1, DIRECTIONS + 1)
    for number, start in enumerate(range(0, points, CHUNK)):
        size = min(CHUNK, points - start)
        which = draws.choice(DIRECTIONS, size, p=weights / weights.sum())
        noise = draws.standard_normal((size, WIDTH), np.float32)
        np.save(folder / f"{number:05d}.npy", spherical_kmeans.unit(middles[which] + noise).astype(np.float32))


def chunks(folder: Path) -> Iterator[np.ndarray]:
    """Yields the chunks."""
    for file in sorted(folder.glob("*.npy")):
        yield np.load(file)


def peak() -> float:
    """Returns the process's peak of resident memory in MiB (Linux; getrusage would count the parent's as well)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def sample(folder: Path, clusters: int) -> np.ndarray:
    """Returns the points that clusters begin with; the chunks are in random order."""
    parts = itertools.islice(chunks(folder), -(-spherical_kmeans.PER_CLUSTER * clusters // CHUNK))
    return np.concatenate(list(parts))[: spherical_kmeans.PER_CLUSTER * clusters]


def ours(folder: Path, clusters: int) -> dict[str, float]:
    passes, marks = [0], []
    kmeans, before, began = spherical_kmeans.kmeans, peak(), time.monotonic()

    def counted() -> Iterator[np.ndarray]:
        passes[0] += 1
        return chunks(folder)

    def marked(*args: Any) -> tuple[np.ndarray, float]:
        found = kmeans(*args)
        marks.append((time.monotonic() - began, passes[0]))
        return found

    spherical_kmeans.kmeans = marked
    centroids, prices, similarity = spherical_kmeans.balanced_kmeans(
        counted, sample(folder, clusters), clusters, 3.0, np.random.default_rng(0))
    seconds, used, mib = time.monotonic() - began, passes[0], peak() - before
    kmeans_seconds, kmeans_passes = marks[-1]
    chosen, similar = spherical_kmeans.assign(counted, centroids, prices)
    sizes = np.bincount(chosen, minlength=clusters)
    return {"kmeans_seconds": kmeans_seconds, "kmeans_passes": kmeans_passes, "kmeans_similarity": similarity,
            "seconds": seconds, "passes": used, "similarity": float(similar.mean()),
            "largest": int(sizes.max()), "smallest": int(sizes.min()), "mib": mib}


def theirs(folder: Path, clusters: int, passes: int) -> dict[str, float]:
    from sklearn.cluster import MiniBatchKMeans

    before, began = peak(), time.monotonic()
    first = spherical_kmeans.kmeans_pp_init(sample(folder, clusters), clusters, np.random.default_rng(0))
    model = MiniBatchKMeans(clusters, init=first, n_init=1, batch_size=CHUNK, random_state=0)
    for _ in range(passes):
        for chunk in chunks(folder):
            model.partial_fit(chunk)
    centroids = spherical_kmeans.unit(model.cluster_centers_).astype(np.float32)
    seconds, mib = time.monotonic() - began, peak() - before
    chosen, similar = spherical_kmeans.assign(lambda: chunks(folder), centroids, np.zeros(clusters, np.float32))
    sizes = np.bincount(chosen, minlength=clusters)
    return {"seconds": seconds, "passes": passes, "similarity": float(similar.mean()), "largest": int(sizes.max()),
            "smallest": int(sizes.min()), "mib": mib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--clusters", type=int, default=256)
    parser.add_argument("--only", nargs=3, metavar=("WHO", "FOLDER", "PASSES"), help="used by the script itself")
    options = parser.parse_args()
    if options.only:
        who, folder, passes = options.only
        found = ours(Path(folder), options.clusters) if who == "ours" else theirs(
            Path(folder), options.clusters, int(passes))
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.points)

        def run(who: str, passes: int = 0) -> dict[str, float]:
            command = [sys.executable, __file__, f"--clusters={options.clusters}", "--only", who, folder, str(passes)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            return json.loads(done.stdout.splitlines()[-1])

        found = {"points": options.points, "clusters": options.clusters, "cores": os.cpu_count(), "ours": run("ours")}
        found["MiniBatchKMeans"] = run("theirs", found["ours"]["kmeans_passes"])
    if options.points == 1_000_000:
        (RESULTS / "million_clusters.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
