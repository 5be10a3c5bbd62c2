"""Four domains of images that have little in common, as one file."""

from pathlib import Path

import cells as shared
import emoji_drawings as emoji
import numpy as np
from etils import epath

from mae_jax.config import default
from mae_jax.data.sources import registry
from mae_jax.data.sources.fashion_scenes import FILES, clothes
from mae_jax.rng import rng

SIDE = 32  # of an image, in pixels
CLASSES = {"clothes": 10, "letters": 26, "emoji": 9, "photographs": 17}  # domain → number of classes
# Images. Those of tests are multiples of `mixtures.ROWS`, so that all batches have one shape.
SIZES = {"train": dict.fromkeys(CLASSES, 2500),
         "test": {"clothes": 9880, "letters": 2280, "emoji": 760, "photographs": 760}}
FIRST = dict(zip(CLASSES, np.cumsum([0, *CLASSES.values()]).tolist(), strict=False))  # domain → its first class
Part = tuple[np.ndarray, np.ndarray]  # uint8 [n, 32, 32, 3], labels [n]


def kept(domain: str) -> str:
    """Returns the value of data.classes that keeps a domain; '' keeps all."""
    return f"{FIRST[domain]}-{FIRST[domain] + CLASSES[domain] - 1}" if domain else ""


def prepare(file: Path, fashion: Path, drawn: Path) -> None:
    """Writes the arrays of all domains, rows in random order; each domain's classes follow those of the one before it.

    Args:
      file: the npz to write.
      fashion, drawn: the folders of scripts/fetch_fashion_mnist.sh and scripts/fetch_emoji.sh.
    """
    arrays = {}
    for split, sizes in SIZES.items():
        parts = {"clothes": on_black(*clothes(epath.Path(fashion), FILES[split])), "letters": source("letters", split),
                 "emoji": on_white(emoji.drawings(drawn)[0][split]), "photographs": source("photo_crops", split)}
        rows = {name: rng(0, f"{name}/{split}", 0).permutation(len(parts[name][1]))[:sizes[name]] for name in CLASSES}
        images = np.concatenate([parts[name][0][rows[name]] for name in CLASSES])
        labels = np.concatenate([parts[name][1][rows[name]] + FIRST[name] for name in CLASSES])
        order = rng(0, split, 0).permutation(len(labels))
        arrays |= {f"x_{split}": images[order], f"y_{split}": labels[order]}
    shared.save(file, arrays)


def on_black(images: np.ndarray, labels: np.ndarray) -> Part:
    """Pads gray images [n, 28, 28]."""
    edge = (SIDE - images.shape[1]) // 2
    return np.repeat(np.pad(images, ((0, 0), (edge, edge), (edge, edge)))[..., None], 3, -1), labels


def on_white(found: list[emoji.Drawing]) -> Part:
    """Draws emoji on white."""
    white = np.full((SIDE, SIDE, 3), 255, np.uint8)
    return (np.stack([emoji.on(emoji.resized(each.image, SIDE), white) for each in found]),
            np.array([each.label for each in found]))


def source(name: str, split: str) -> Part:
    """Reads a source of square images, resized."""
    data = default().data.copy_and_resolve_references()
    data.source = name
    found = registry.load(data, split)
    examples = [found.read(i) for i in range(found.size)]
    resized = [emoji.resized(example.image, SIDE) for example in examples]
    return np.stack(resized), np.array([example.label for example in examples])
