"""A grid of training inputs, with the name and the class of each image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mae_jax.errors import printable
from mae_jax.evals.image_grid import fitting
from mae_jax.evals.object_figures import object_names, with_objects
from mae_jax.methods.base import Method
from mae_jax.ops import example_ids

GRID_SIDE = 8  # maximum number of images per row and per column
GAP = 2  # pixels between images of the grid
LEAST_WIDTH = 112  # minimum width of an image in pixels; smaller ones are enlarged by a whole factor
LINE = 12  # height of a line of a caption, in pixels
TEXT = 10  # font size of a caption, in pixels


def drawn(method: Method, batch: dict[str, np.ndarray], captions: Sequence[tuple[str, str]], title: str) -> np.ndarray:
    """Draws the panels of `Method.input_images` for the first images of a batch, one below the other, with captions.

    Args:
      method: the method.
      batch: a training batch on the host, of whole groups.
      captions: two lines for each image; their number limits the number of images.
      title: text at the top; the names of the panels are appended.

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
    """Returns the name of the i-th image of a batch, and its classes, '' for none.

    Args:
      batch: a batch on the host.
      i: the row.
      classes: names of the classes.
      part: the Source or RecordStream of the image; None: the name is the example's number.
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
    """Pads an image with white to `width`, plus the gap on the right and below."""
    return np.pad(image, ((0, GAP), (0, width - image.shape[1] + GAP), (0, 0)), constant_values=255)


def _text(lines: Sequence[str], width: int) -> np.ndarray:
    """Draws lines of text, black on white, uint8 [height, width, 3]; a line that is too long loses its beginning."""
    image = Image.new("RGB", (width, LINE * len(lines) + GAP), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(TEXT)
    for place, line in enumerate(lines):
        draw.text((0, place * LINE), fitting(line, width - GAP, font), "black", font)
    return np.asarray(image)
