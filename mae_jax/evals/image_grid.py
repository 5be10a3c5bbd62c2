"""Grids of captioned images, for PNGs."""

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

CELL = 128  # smallest side of a picture in a grid, in screen pixels
GAP, CAPTION, NAME = 4, 18, 120  # screen pixels between pictures, for a line of text above, and for text on the left


def tile(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str], title: str,
         names: Sequence[str] = ()) -> np.ndarray:
    """Lays rows of equally large uint8 pictures out: captions above columns, names left of rows, a title at the top."""
    height, width = rows[0][0].shape[:2]
    scale = max(1, -(-CELL // min(height, width)))
    step_y, step_x = height * scale + GAP, width * scale + GAP
    left = GAP + NAME * bool(names)
    canvas = Image.new("RGB", (left + step_x * len(rows[0]), 2 * CAPTION + step_y * len(rows) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, 3), title, fill="black")
    for column, caption in enumerate(captions[: len(rows[0])]):
        draw.text((left + column * step_x, CAPTION + 3), caption, fill="black")
    for y, name in enumerate(names):
        draw.text((GAP, 2 * CAPTION + y * step_y), name, fill="black")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            large = Image.fromarray(picture).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(large, (left + x * step_x, 2 * CAPTION + y * step_y))
    return np.asarray(canvas)


def paired(rows: Sequence[Sequence[np.ndarray]]) -> list[tuple[np.ndarray, ...]]:
    """Returns the rows of uint8 pictures two and two side by side; where one is missing, white ones."""
    half = (len(rows) + 1) // 2
    blank = (np.full_like(rows[0][0], 255),) * len(rows[0])
    return [(*left, *right) for left, right in itertools.zip_longest(rows[:half], rows[half:], fillvalue=blank)]
