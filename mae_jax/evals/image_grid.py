"""Grids of captioned images, for PNGs."""

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 128  # minimum side of an image in a grid, in screen pixels
GAP, CAPTION, NAME = 4, 18, 120  # screen pixels: gap between images, line of text, text on the left
LETTER, SMALL = 11, 9  # font sizes in pixels, of titles and captions, and of text below images
CUT = "..."

Row = tuple[np.ndarray, ...]


def tile(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str], title: str, names: Sequence[str] = (),
         below: Sequence[str] = ()) -> np.ndarray:
    """Draws a grid of images, uint8 [height, width, 3].

    Args:
      rows: rows of images uint8 [h, w, 3], all of one size.
      captions: text above each column.
      title: text at the top, wrapped to the width.
      names: text left of each row.
      below: text below the first panel of each data image. A row can show several data images, see `paired`.
    """
    height, width = rows[0][0].shape[:2]
    scale = max(1, -(-CELL // min(height, width)))
    step_y, step_x = height * scale + GAP + CAPTION * bool(below), width * scale + GAP
    left, font, small = GAP + NAME * bool(names), ImageFont.load_default(LETTER), ImageFont.load_default(SMALL)
    across = left + step_x * len(rows[0])
    lines = _wrapped(title, across - 2 * GAP, font)
    top = CAPTION * (len(lines) + 1)
    canvas = Image.new("RGB", (across, top + step_y * len(rows) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((GAP, 3 + number * CAPTION), line, "black", font)
    for column, caption in enumerate(captions[: len(rows[0])]):
        draw.text((left + column * step_x, top - CAPTION + 3), fitting(caption, step_x - GAP, font), "black", font)
    for y, name in enumerate(names):
        for number, line in enumerate(name.split("\n")):
            draw.text((GAP, top + y * step_y + number * (LETTER + 3)), fitting(line, NAME - GAP, font), "black", font)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            large = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(large, (left + x * step_x, top + y * step_y))
    blocks = -(-len(below) // len(rows))  # data images per row, see `paired`
    panels = len(rows[0]) // max(blocks, 1)
    for number, text in enumerate(below):
        block, y = divmod(number, len(rows))
        draw.text((left + block * panels * step_x, top + y * step_y + height * scale + 1),
                  fitting(text, panels * step_x - GAP, small), "dimgray", small)
    return np.asarray(canvas)


def paired(rows: Sequence[Sequence[np.ndarray]]) -> list[Row]:
    """Puts the second half of the rows beside the first half; pads an odd number of rows with white images."""
    half = (len(rows) + 1) // 2
    blank = (np.full_like(rows[0][0], 255),) * len(rows[0])
    return [(*left, *right) for left, right in itertools.zip_longest(rows[:half], rows[half:], fillvalue=blank)]


def fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Returns the text, with its beginning replaced by '...' if it is wider than `width` pixels."""
    text = text.encode("latin-1", "replace").decode("latin-1") if isinstance(font, ImageFont.ImageFont) else text
    if font.getlength(text) <= width:
        return text
    return next(short for start in range(1, len(text) + 1)
                if font.getlength(short := CUT + text[start:]) <= width or start == len(text))


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Wraps the text into lines of at most `width` pixels; a single word can be wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
