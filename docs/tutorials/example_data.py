"""Writes a small data set, for who wants to follow a tutorial and has no images at hand.

  python docs/tutorials/example_data.py photos      photos/: 300 parts of six photographs, without labels
  python docs/tutorials/example_data.py labelled    labelled/train/CLASS/ and labelled/val/CLASS/: few with labels
  python docs/tutorials/example_data.py objects     objects/: scenes with two kinds of things, annotated as COCO does

The photographs are those that scikit-image installs with itself. Everything is drawn from one seed.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from skimage import data

PHOTOGRAPHS = ("astronaut", "brick", "chelsea", "coffee", "grass", "gravel")
SIDE = 128  # pixels
SHARES = {"photos": (0.0, 0.6), "train": (0.0, 0.6), "val": (0.6, 1.0)}  # of the width: no pixel is in both


def part(name: str, split: str, rng: np.random.Generator, side: int = SIDE) -> Image.Image:
    """Cuts a square from the split's share of a photograph, RGB of side x side pixels."""
    image = Image.fromarray(getattr(data, name)()).convert("RGB")
    first, last = (int(share * image.width) for share in SHARES[split])
    size = int(rng.integers(64, min(SIDE, last - first) + 1))
    left, top = int(rng.integers(first, last - size + 1)), int(rng.integers(image.height - size + 1))
    return image.crop((left, top, left + size, top + size)).resize((side, side), Image.Resampling.BICUBIC)


def photos() -> None:
    folder, rng = Path("photos"), np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for number in range(300):
        part(PHOTOGRAPHS[number % 6], "photos", rng).save(folder / f"{number:03d}.png")


def labelled() -> None:
    rng = np.random.default_rng(1)
    for split, count in (("train", 10), ("val", 30)):
        for name in PHOTOGRAPHS:
            folder = Path("labelled", split, name)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                part(name, split, rng).save(folder / f"{number:03d}.png")


def objects() -> None:
    folder, rng = Path("objects"), np.random.default_rng(2)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 400), ("val", 80)):
        images, annotations = [], []
        for number in range(count):
            scene = part(PHOTOGRAPHS[number % 6], split, rng, 96)
            name = f"{split}_{number:03d}.png"
            images.append({"id": number, "file_name": name, "width": scene.width, "height": scene.height})
            for _ in range(int(rng.integers(1, 4))):
                box, kind = draw_thing(scene, rng)
                x1, y1, x2, y2 = box
                outline = [x1, y1, x2, y1, x2, y2, x1, y2] if kind == 1 else ellipse(*box)
                area = (x2 - x1) * (y2 - y1) * (1 if kind == 1 else np.pi / 4)
                annotations.append({"id": len(annotations), "image_id": number, "category_id": kind, "iscrowd": 0,
                                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area,
                                    "segmentation": [outline]})
            scene.save(folder / "images" / name)
        categories = [{"id": 1, "name": "card"}, {"id": 2, "name": "coin"}]
        (folder / f"{split}.json").write_text(json.dumps(
            {"images": images, "annotations": annotations, "categories": categories}))


def draw_thing(scene: Image.Image, rng: np.random.Generator) -> tuple[tuple[int, int, int, int], int]:
    """Draws a card (1) or a coin (2) of a random color on the scene; returns its box, x1, y1, x2, y2, and kind."""
    kind, width, height = int(rng.integers(1, 3)), int(rng.integers(16, 40)), int(rng.integers(16, 40))
    width, height = (width, height) if kind == 1 else (width, width)
    left, top = int(rng.integers(96 - width)), int(rng.integers(96 - height))
    box = (left, top, left + width, top + height)
    pen = ImageDraw.Draw(scene)
    inside = (left, top, left + width - 1, top + height - 1)  # Pillow's boxes have their last pixel within
    (pen.rectangle if kind == 1 else pen.ellipse)(inside, fill=tuple(rng.integers(0, 256, 3).tolist()))
    return box, kind


def ellipse(x1: int, y1: int, x2: int, y2: int) -> list[float]:
    """Returns the outline of the ellipse in a box, 24 points x, y, ..."""
    turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    across, down = (x1 + x2) / 2 + (x2 - x1) / 2 * np.cos(turns), (y1 + y2) / 2 + (y2 - y1) / 2 * np.sin(turns)
    return np.stack([across, down], 1).ravel().round(2).tolist()


if __name__ == "__main__":
    SETS = {"photos": photos, "labelled": labelled, "objects": objects}
    if len(sys.argv) != 2 or sys.argv[1] not in SETS:
        sys.exit(__doc__)
    SETS[sys.argv[1]]()
