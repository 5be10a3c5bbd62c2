"""The drawings of emoji that two studies use, of two vendors, with their classes."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

VENDORS = ("google", "twitter")
TEST = 5  # one emoji in so many is of the test split, as drawn by both vendors


class Drawing(NamedTuple):
    """An emoji, uint8 [64, 64, 4] with alpha, and its class number."""

    image: np.ndarray
    label: int


def drawings(folder: Path) -> tuple[dict[str, list[Drawing]], tuple[str, ...]]:
    """Returns split → the emoji, neighbors of one vendor, and the class names: Unicode's categories without parts.

    Of an emoji with skin tones, there is the one without. No emoji is in both splits, in the drawing of either vendor.

    Args:
      folder: where scripts/fetch_emoji.sh has put the drawings.
    """
    known = [each for each in json.loads((folder / "emoji.json").read_text()) if each["category"] != "Component"]
    classes = tuple(sorted({each["category"] for each in known}))
    found: dict[str, list[Drawing]] = {"train": [], "test": []}
    for number, each in enumerate(sorted(known, key=lambda each: each["sort_order"])):
        for vendor in VENDORS:
            if (file := folder / vendor / each["image"]).exists():
                image = np.asarray(Image.open(file).convert("RGBA"))
                found["train" if number % TEST else "test"].append(Drawing(image, classes.index(each["category"])))
    return found, classes


def on(drawing: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Returns a drawing, uint8 [h, w, 4], blended into a ground of the same size, uint8 [h, w, 3], by its alpha."""
    alpha = drawing[..., 3:].astype(np.float32) / 255
    return (ground + (drawing[..., :3] - ground.astype(np.float32)) * alpha + 0.5).astype(np.uint8)


def resized(drawing: np.ndarray, side: int) -> np.ndarray:
    """Resizes a drawing to [side, side, 4]."""
    return np.asarray(Image.fromarray(drawing).resize((side, side), Image.Resampling.BILINEAR))
