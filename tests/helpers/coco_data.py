"""Small data sets in COCO's format, as tools lay them out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 90, "name": "kite"}, {"id": 1, "name": "cat"}]  # with gaps, unsorted
SIZE = (40, 60)  # height, width


def image(folder: Path, name: str, seed: int = 0, size: tuple[int, int] = SIZE) -> None:
    """Writes an image of smooth colors."""
    folder.mkdir(parents=True, exist_ok=True)
    colors = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    Image.fromarray(colors).resize(size[::-1], Image.Resampling.BICUBIC).save(folder / name)


def square(number: int, image_id: int, x: float, y: float, side: float, category: int = 1, **more: Any
           ) -> dict[str, Any]:
    """Returns the annotation of a square."""
    corners = [x, y, x + side, y, x + side, y + side, x, y + side]
    return {"id": number, "image_id": image_id, "category_id": category, "bbox": [x, y, side, side],
            "area": side * side, "iscrowd": 0, "segmentation": [corners], **more}


def write(file: Path, images: dict[int, str], annotations: list[Any], categories: list[Any] = CATEGORIES,
          **entries: Any) -> None:
    """Writes annotations; `images` are names by id."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({
        "info": {"year": 2026}, "licenses": [],
        "images": [{"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
                   for number, name in images.items()], "annotations": annotations, "categories": categories,
        **entries}))


def coco(root: Path) -> None:
    """Writes a data set as COCO is: three images to train, of which one has no object, and one to evaluate."""
    for k in range(3):
        image(root / "train2017", f"{k:012d}.png", k)
    image(root / "val2017", "000000000007.png", 7)
    write(root / "annotations" / "instances_train2017.json", {k + 10: f"{k:012d}.png" for k in range(3)}, [
        square(1, 10, 5, 10, 20, 3), square(2, 10, 30.5, 4.25, 10.5, 90), square(3, 12, 0, 0, 30, 1),
        square(4, 12, 20, 5, 30, 1, iscrowd=1, segmentation={"size": list(SIZE), "counts": [1000, 600, 800]})])
    write(root / "annotations" / "instances_val2017.json", {7: "000000000007.png"}, [square(1, 7, 5, 5, 12, 90)])
    write(root / "annotations" / "captions_train2017.json", {}, [])
