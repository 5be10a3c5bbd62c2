"""A grid of images as a method trains on them, with what each is called and its class below."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mae_jax.errors import printable
from mae_jax.evals.image_grid import fitting
from mae_jax.evals.object_figures import object_names, with_objects
from mae_jax.methods.base import Method
from mae_jax.ops import example_ids

GRID_SIDE = 8  # images along and down the grid, at most
GAP = 2  # pixels between images of the grid
LEAST_WIDTH = 112  # pixels of an image in the grid: smaller ones are shown two, three ... times as large
LINE = 12  # pixels of a line of a caption
TEXT = 10  # pixels of its letters


def drawn(method: Method, batch: dict[str, np.ndarray], captions: Sequence[tuple[str, str]], title: str) -> np.ndarray:
    """Draws the first images of a batch as `Method.input_images` shows them, one below the other, above a caption.

    Args:
      method: what is trained.
      batch: of training, on the host; whole groups.
      captions: two lines for each image, or for as many as are drawn.
      title: above all, before what each row is.

    Returns:
      uint8 [height, width, 3].
    """
    most = min(len(captions), GRID_SIDE * GRID_SIDE)
    few = {name: value[:-(-most // method.group) * method.group] for name, value in batch.items()}
    panels = {name: images[:most] for name, images in method.input_images(few).items()}
    if "box" in few:
        panels["objects"] = with_objects(panels["input"], few)
    width = max(images.shape[2] for images in panels.values())
    times = -(-LEAST_WIDTH // width)
    shown = [images.repeat(times, 1).repeat(times, 2) for images in panels.values()]
    cells = []
    for i in range(most):
        images = [_framed(images[i], width * times) for images in shown]
        cells.append(np.concatenate([*images, _text(captions[i], width * times + GAP)]))
    side = min(GRID_SIDE, len(cells))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % side)
    rows = [np.concatenate(cells[i:i + side], axis=1) for i in range(0, len(cells), side)]
    what = f"from the top: {', '.join(panels)}" if len(panels) > 1 else ""
    words = [line for line in (title, what) if line]
    return np.concatenate([_text(words, rows[0].shape[1]), *rows] if words else rows)


def caption(batch: Mapping[str, Any], i: int, classes: Sequence[str], part: Any = None) -> tuple[str, str]:
    """Returns what the i-th image of a batch is called, or its number, and its class or classes, '' for none.

    Args:
      batch: of training, on the host.
      i: the row.
      classes: their names.
      part: the Source or RecordStream that it is of; None: it has no names.
    """
    number = int(example_ids.whole(batch["id"])[i])
    name = part.name(number) if part else f"{number}"
    if not batch["valid"][i]:
        return name, "cannot be read"
    if "box" in batch:
        return name, object_names(batch, i, classes)
    label = [batch["label"][i]] if "label" in batch else []
    present = np.flatnonzero(batch["labels"][i]) if "labels" in batch else label
    return name, ", ".join(printable(classes[k]) if k < len(classes) else f"class {k}" for k in present if k >= 0)


def _framed(image: np.ndarray, width: int) -> np.ndarray:
    """Adds the gap below, and white on the right up to the width."""
    return np.pad(image, ((0, GAP), (0, width - image.shape[1] + GAP), (0, 0)), constant_values=255)


def _text(lines: Sequence[str], width: int) -> np.ndarray:
    """Draws lines of text, black on white, uint8 [lines, width, 3]; of what is too long the beginning is left out."""
    image = Image.new("RGB", (width, LINE * len(lines) + GAP), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(TEXT)
    for place, line in enumerate(lines):
        draw.text((0, place * LINE), fitting(line, width - GAP, font), "black", font)
    return np.asarray(image)
