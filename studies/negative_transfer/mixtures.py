"""What study.py and instrument.py train and measure: masked autoencoders of domains, mixtures, linear probes."""

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import cells as shared
import jax
import jax.numpy as jnp
import numpy as np
from domains import CLASSES, FIRST, SIDE, SIZES, kept, prepare
from etils import epath
from ml_collections import ConfigDict

from mae_jax.commands.cluster.images import cluster
from mae_jax.commands.export.expert_path import (
    HELD_OUT_SHARE,
    MAX_PROBED_PATHS,
    Task,
    cluster_paths,
    count_cluster_votes,
    extracted,
    most_voted,
    ranked,
    votes_per_path,
)
from mae_jax.config import default, resolved
from mae_jax.data import NO_DATA, DataInfo
from mae_jax.data.cluster_ids import Clusters
from mae_jax.evals import linear_probe
from mae_jax.evals.context import Pair
from mae_jax.methods import build
from mae_jax.methods.base import pool
from mae_jax.methods.moce import MoCE
from mae_jax.param_tree import flatten, split_eval_params
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import workdir

PATCH, BATCH = 4, 16  # pixels; images of a batch: few, as in configs/quickstart.py
WIDTH, DEPTH, HEADS = 48, 6, 4  # narrow: the domains must compete for it
EXPERTS, CLUSTERS, RATIO = 4, 16, 3.0  # of a mixture; the largest ratio of the sizes of two clusters
RANDOM = 3  # paths other than the voted one whose mean is a random path
RATE, BETAS = 2e-2, (0.9, 0.98)  # per 256 images, of the first training; as in configs/quickstart.py
ROWS = 380  # images that are encoded at once; it divides all test splits
FIRST_STEPS = 14_400  # steps of the first training of all domains


class Mixture(NamedTuple):
    """How experts are trained."""

    blocks: str = "last_two_odd"
    rate: float = 1e-2  # per 256 images
    steps: int = 1920
    gate: dict[str, float] | None = None  # fields of the gate, where they are not the defaults


SHARP = {"noise": 0.0, "temperature": 0.1}  # a gate decides from the first step on
CHANGED = Mixture("1,3,5", 4e-2, 4800, SHARP)  # what moves experts most (instrument.py)


def common(config: ConfigDict, file: Path, domain: str, seed: int, steps: int) -> ConfigDict:
    """Sets data, encoder and duration; domain '': all of them."""
    config.seed, config.batch_size = seed, BATCH
    config.data.update(source="npz", path=str(file), classes=kept(domain), image_size=(SIDE, SIDE), flip=False,
                       crop_scale=(0.4, 1.0), eval_split="", threads=1, workers="0")
    config.model.update(width=WIDTH, depth=DEPTH, heads=HEADS, patch=(PATCH, PATCH), pool="mean")
    config.eval.every = config.checkpoint.every = config.train.duration = f"{steps} steps"
    config.log.update(every="200 steps", tensorboard=False)
    config.optim.warmup = f"{max(1, steps // 20)} steps"
    return config


def masked(file: Path, domain: str, seed: int, steps: int, lr: float = RATE, start: str = "",
           mixture: dict[str, Any] | None = None, clusters: str = "") -> ConfigDict:
    """Returns the config of a MAE, or of a mixture with the fields given; `start`: the workdir that it goes on from."""
    config = common(default("mae" if mixture is None else "moce"), file, domain, seed, steps)
    config.method.update(decoder_width=WIDTH, decoder_depth=1, decoder_heads=HEADS)
    config.method.target = "pixel"
    config.optim.update(lr=lr, betas=BETAS)
    config.init_from = start
    if mixture is not None:
        config.method.update(experts=EXPERTS, clusters=clusters, **mixture)
    return config.lock()


def clustered(encoder: Path, folder: Path, seed: int) -> str:
    """Clusters the images of all domains by an encoder, if that is not done. Returns the folder."""
    cluster(str(encoder), str(folder), CLUSTERS, -1, RATIO, seed, None)
    return str(folder)


class Paths:
    """The encoders that can be cut out of a mixture."""

    def __init__(self, mixture: Path, file: Path):
        self.config, self.file = workdir.config_of(str(mixture)), file
        params, extras = split_eval_params(load_params(str(mixture), extras=True))
        self.params = params
        self.clusters = Clusters.read(self.config.method.clusters)
        self.method = MoCE(resolved(self.config), DataInfo(clusters=self.clusters))
        self.table, self.of_cluster = cluster_paths(self.method, params, extras)

    def voted(self, domain: str) -> tuple[int, ...]:
        """Returns the path with the most votes of a domain's training images."""
        task = votes(self.config.method.clusters, self.file, domain)
        return most_voted(votes_per_path(self.of_cluster, task.votes), self.of_cluster, self.clusters, task)

    def encoders(self, domain: str, how: str) -> list[Any]:
        """Returns the parameters of the voted path ('vote'), the best one by a probe ('probe'), or RANDOM others."""
        taken = [self.voted(domain)]
        if how == "probe":
            task = votes(self.config.method.clusters, self.file, domain)
            voted = ranked(votes_per_path(self.of_cluster, task.votes))[:MAX_PROBED_PATHS]  # as `export` does
            taken = [max((path for path, share in voted if share > 0),
                         key=lambda path: held_out(self.encoder(domain, path), self.file, domain))]
        if how == "random":
            others = sorted(set(self.of_cluster) - set(taken))
            taken = [others[row] for row in np.random.default_rng(0).permutation(len(others))[:RANDOM]]
        return [self.encoder(domain, path) for path in taken]

    def encoder(self, domain: str, path: tuple[int, ...]) -> Any:
        """Returns the parameters of a path."""
        task = votes(self.config.method.clusters, self.file, domain)
        return extracted(self.method, self.params, self.table, self.of_cluster, task, path)[0]

    def measured(self, domain: str, how: str) -> dict[str, float]:
        """Returns the mean of `measured` over these encoders; without any other path, of the voted one."""
        encoders = self.encoders(domain, how) or self.encoders(domain, "vote")
        found = [measured(params, self.file, domain) for params in encoders]
        return {name: statistics.mean(each[name] for each in found) for name in found[0]}


@functools.cache
def votes(clusters: str, file: Path, domain: str) -> Task:
    """Returns the votes of a domain's training images for clusters."""
    data = common(default("mae"), file, domain, 0, 1).lock()
    return count_cluster_votes(Clusters.read(clusters), epath.Path(clusters), data)


@functools.cache
def dense() -> Any:
    """Returns the masked autoencoder without experts, which all encoders here are judged as."""
    return build(resolved(masked(Path(), "", 0, 1)), NO_DATA)


@jax.jit
def encode(params: Any, patches: jax.Array) -> jax.Array:
    """Returns the features float32 [B, D] of patches uint8 [B, N, P]."""
    method = dense()
    order = jnp.broadcast_to(jnp.arange(patches.shape[1]), patches.shape[:2])
    return pool(method.encode(params, {}, {"patches": patches, "order": order}), "mean")


@jax.jit
def errors(params: Any, patches: jax.Array, order: jax.Array) -> jax.Array:
    """Returns the error float32 [] of the reconstruction of patches [B, N, P], the first of `order` [B, N] visible."""
    method = dense()
    batch = {"patches": jnp.take_along_axis(patches, order[..., None], 1), "order": order,
             "valid": jnp.ones(len(order))}
    return method.loss(params, {}, batch, jax.random.key(0), jnp.zeros((), jnp.int32), train=True)[0]


@functools.cache
def images(file: Path, domain: str, split: str) -> Pair:
    """Returns the patches uint8 [n, N, P] of a domain's images, and their labels int32 [n]."""
    with np.load(file) as arrays:
        pixels, labels = arrays[f"x_{split}"], arrays[f"y_{split}"] - FIRST[domain]
    mine = (labels >= 0) & (labels < CLASSES[domain])
    return np.stack([dense().grid.patchify(image) for image in pixels[mine]]), labels[mine].astype(np.int32)


def features(params: Any, patches: np.ndarray) -> np.ndarray:
    """Returns `encode` of all patches [n, N, P], batch by batch."""
    return np.concatenate([encode(params, patches[first:first + ROWS]) for first in range(0, len(patches), ROWS)])


def measured(params: Any, file: Path, domain: str) -> dict[str, float]:
    """Returns what an encoder and its decoder are worth to a domain.

    Args:
      params: of a MAE without experts.
      file, domain: whose images.

    Returns:
      'probe': test top-1 of logistic regression on the frozen features of the training images. 'loss': the error of
      reconstructing masked patches of test images, in normalized pixels; the masks are the same for all encoders.
    """
    parts = {split: images(file, domain, split) for split in ("train", "test")}
    train, test = ((features(params, patches), labels) for patches, labels in parts.values())
    patches = parts["test"][0]
    order = np.argsort(np.random.default_rng(0).random(patches.shape[:2]), axis=1).astype(np.int32)
    losses = [float(errors(params, patches[rows], order[rows])) for rows in
              (slice(first, first + ROWS) for first in range(0, len(patches), ROWS))]
    return {"probe": linear_probe.top1(train, test, CLASSES[domain]), "loss": float(np.mean(losses))}


def held_out(params: Any, file: Path, domain: str) -> float:
    """Returns the top-1 of logistic regression on a held-out part of a domain's training images."""
    patches, labels = images(file, domain, "train")
    found, rest = features(params, patches), round(len(labels) * (1 - HELD_OUT_SHARE))
    return linear_probe.top1((found[:rest], labels[:rest]), (found[rest:], labels[rest:]), CLASSES[domain])


def untrained(seed: int) -> Any:
    """Returns random parameters."""
    patches = np.zeros((1, dense().grid.num_patches, PATCH * PATCH * 3), np.uint8)
    order = np.arange(patches.shape[1], dtype=np.int32)[None]
    return dense().init(jax.random.key(seed), {"patches": patches, "order": order})[0]


def load(folder: Path) -> Any:
    """Returns the parameters of a workdir."""
    return split_eval_params(load_params(str(folder), extras=True))[0]


def mixed(about: Mixture, seed: int, file: Path, first: Path, clusters: str, folder: Path, work: Path,
          ways: tuple[str, ...]) -> dict[str, Any]:
    """Trains a mixture from the first training, if it is not there. Returns what its paths are worth, and more.

    Returns:
      For each of the ways to choose a path, domain → `measured`; `moved`; 'paths', how many paths the domains vote
      for; 'confidence', the largest gate.
    """
    fields = {"blocks": about.blocks, **(about.gate or {})}
    last = shared.trained(masked(file, "", seed, about.steps, about.rate, str(first), fields, clusters), folder, work)
    paths = Paths(folder, file)
    found = {how: {domain: paths.measured(domain, how) for domain in CLASSES} for how in ways}
    return found | moved(first, folder) | {
        "paths": len({paths.voted(domain) for domain in CLASSES}), "confidence": last["train/gate_confidence"]}


def moved(start: Path, mixture: Path) -> dict[str, float]:
    """Returns how far experts are from the MLP that they were copied from, and from each other.

    Each is the Frobenius norm of the difference over that of the MLP: a mean over blocks, layers and experts.
    """
    before, after = (flatten(load_params(str(folder))) for folder in (start, mixture))
    away, apart = [], []
    for name, kernel in after.items():
        if "/experts/" not in name or not name.endswith("/kernel"):
            continue
        mlp = np.asarray(before[name.replace("/experts/", "/mlp/")])
        size, kernels = np.linalg.norm(mlp), np.asarray(kernel)
        away += [np.linalg.norm(each - mlp) / size for each in kernels]
        apart += [np.linalg.norm(one - other) / size for i, one in enumerate(kernels) for other in kernels[:i]]
    return {"from_start": round(float(np.mean(away)), 4), "from_each_other": round(float(np.mean(apart)), 4)}


def options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the flags, and writes the images of the domains if they are not there."""
    parser.add_argument("--work", type=Path, default=Path("runs/negative_transfer"), help="images and what is trained")
    parser.add_argument("--fashion", type=Path, default=Path("runs/fashion_mnist"), help="Fashion-MNIST's files")
    parser.add_argument("--emoji", type=Path, default=Path("runs/emoji"), help="the drawings of emoji")
    parser.add_argument("--hours", type=float, default=0.0, help="begin no cell after so many hours; 0: no limit")
    parser.add_argument("--workers", type=shared.positive, default=1, help="cells at once; --work must be kept")
    found = parser.parse_args()
    found.work.mkdir(parents=True, exist_ok=True)
    if not (file := found.work / "domains.npz").exists():
        prepare(file, found.fashion, found.emoji)
    with np.load(file) as arrays:
        if any(len(arrays[f"y_{split}"]) != sum(sizes.values()) for split, sizes in SIZES.items()):
            parser.error(f"{file} has other images than domains.py; use another --work")
    return found
