"""data.source=fashion_scenes: gray clothes and shoes on parts of photographs, each with its box and mask.

6000 scenes to train and 600 to test, 96 x 96, from the 60,000 and 10,000 images of Fashion-MNIST (arXiv 1708.07747, MIT
license). Debian's package dataset-fashion-mnist installs these under /usr/share/datasets/fashion-mnist; data.path names
another folder. See `scenes` for how scenes are made.
"""

import functools
import gzip
import zlib

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.data.sources import scenes
from mae_jax.data.sources.base import Source, known_split
from mae_jax.data.sources.splits import Split
from mae_jax.errors import UserError
from mae_jax.storage.paths import locate

FOLDER = "/usr/share/datasets/fashion-mnist"
FILES = {"train": "train", "test": "t10k"}
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDE = 28
INK = 15  # gray level above which a pixel belongs to the thing: 6 % of white, so that dark clothes have pixels


def load(data: ConfigDict, split: Split) -> Source:
    """Opens 'train' (6000 scenes) or 'test' (600), or a slice; raises UserError if the files do not exist."""
    known_split(split, tuple(scenes.SIZES))
    images, labels = clothes(locate(data.path or FOLDER, "data.path"), FILES[split.name])
    things = scenes.Things(functools.partial(_image, images), labels, INK, pasted)
    return scenes.source("fashion_scenes", split.name, things, CLASSES).sliced(split)


def _image(images: np.ndarray, number: int) -> np.ndarray:
    return images[number]


def pasted(part: np.ndarray, thing: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """Pastes a thing unchanged on a part of a photograph, except its black pixels."""
    return np.where((thing > INK)[..., None], thing[..., None], part)


@functools.lru_cache(maxsize=4)
def clothes(folder: epath.Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images uint8 [n, 28, 28] and labels int64 [n] of the files 'train' or 't10k'; raises UserError."""
    images = _idx(folder / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, SIDE, SIDE)
    return images, _idx(folder / f"{name}-labels-idx1-ubyte.gz", 8).astype(np.int64)


def _idx(file: epath.Path, header: int) -> np.ndarray:
    """Returns the bytes after the header of a file in MNIST's format, uint8 [n]; raises UserError."""
    if not file.is_file():
        raise UserError(f"{file.parent} has no {file.name}; run: apt-get install dataset-fashion-mnist, or set "
                        "data.path to the folder of its files")
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if len(content) <= header or (len(content) - header) % (SIDE * SIDE if header == 16 else 1):
        raise UserError(f"{file} is damaged: {len(content)} bytes")
    return np.frombuffer(content, np.uint8, offset=header)
