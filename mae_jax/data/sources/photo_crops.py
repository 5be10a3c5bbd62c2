"""data.source=photo_crops: square crops of the 17 photographs that scikit-image and scikit-learn install.

The label is the photograph of a crop: scene and texture identification, not object recognition. Training crops come
from the left of each photograph, test crops from its right, with a gap in between: no pixel is in both.
"""

import functools
import io
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.decode import to_rgb
from mae_jax.data.sources.base import Example, Source, known_split, package_folder
from mae_jax.data.sources.splits import Split
from mae_jax.rng import rng

SCIKIT_IMAGE = ("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png",
                "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
                "retina.jpg", "rocket.jpg")
SCIKIT_LEARN = ("china.jpg", "flower.jpg")
CLASSES = tuple(name.split(".")[0] for name in SCIKIT_IMAGE + SCIKIT_LEARN)
CROPS = {"train": 200, "test": 60}  # per photograph
TRAIN_SHARE = 0.6  # of the width
SIDES = (32, 64)  # smallest and largest side of a crop, in pixels of the photograph


def load(data: ConfigDict, split: Split) -> Source:
    """Opens 'train' (200 crops per photograph) or 'test' (60), or a slice; neighbors have different labels."""
    known_split(split, tuple(CROPS))
    crops = _crops(split.name)
    classes = len(CLASSES)
    source = Source(
        size=len(crops),
        read=functools.partial(_read, crops),
        name=_name,
        classes=CLASSES,
        label=lambda i: i % classes,
    )
    return source.sliced(split)


def _read(crops: list[np.ndarray], i: int) -> Example:
    return Example(crops[i], i % len(CLASSES))


def _name(i: int) -> str:
    return f"{CLASSES[i % len(CLASSES)]}/{i // len(CLASSES)}"


def regions(width: int) -> dict[str, tuple[int, int]]:
    """Returns the columns [first, past last] of each split; the gap is the largest side of a crop, if it fits."""
    left = int(width * TRAIN_SHARE)
    gap = min(SIDES[1], width - left - SIDES[1])
    return {"train": (0, left), "test": (left + max(gap, 0), width)}


@functools.cache
def _crops(split: str) -> list[np.ndarray]:
    """Returns the crops, uint8 [side, side, 3], with alternating classes."""
    photographs = [photograph(path) for path in paths()]
    return [_crop(photographs[label], split, label, k) for k in range(CROPS[split]) for label in range(len(CLASSES))]


def paths() -> list[Path]:
    """Returns the files of the photographs, in the order of CLASSES; raises UserError if a package is missing."""
    images = package_folder("skimage", "scikit-image", "photo_crops") / "data"
    learn = package_folder("sklearn", "scikit-learn", "photo_crops") / "datasets" / "images"
    return [images / name for name in SCIKIT_IMAGE] + [learn / name for name in SCIKIT_LEARN]


def photograph(path: Path) -> np.ndarray:
    """Returns the pixels of a file, uint8 [height, width, 3]."""
    return np.asarray(to_rgb(Image.open(io.BytesIO(path.read_bytes()))))


def _crop(photograph: np.ndarray, split: str, label: int, k: int) -> np.ndarray:
    """Returns the k-th crop of a photograph, the same in every run, for any seed."""
    draws = rng(0, f"photo_crops/{split}/{CLASSES[label]}", k)
    first, last = regions(photograph.shape[1])[split]
    side = int(draws.integers(SIDES[0], min(SIDES[1], last - first) + 1))
    left = int(draws.integers(first, last - side + 1))
    top = int(draws.integers(photograph.shape[0] - side + 1))
    return np.ascontiguousarray(photograph[top:top + side, left:left + side])
