"""Grids of captioned images, for PNGs."""

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 128  # smallest side of an image in a grid, in screen pixels
GAP, CAPTION, NAME = 4, 18, 120  # screen pixels between images, for a line of text, and for text on the left
LETTER, SMALL = 11, 9  # screen pixels of letters, and of those below images
CUT = "..."

Row = tuple[np.ndarray, ...]


def tile(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str], title: str, names: Sequence[str] = (),
         below: Sequence[str] = ()) -> np.ndarray:
    """Lays rows of equally large uint8 images out, as uint8 [height, width, 3].

    Args:
      rows: of images [height, width, 3].
      captions: above the columns.
      title: at the top; as many lines as its width needs.
      names: left of the rows.
      below: one text for each image of a data set, of which a row may have several: below the first of its panels.
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
    blocks = -(-len(below) // len(rows))  # data images side by side, see `paired`
    panels = len(rows[0]) // max(blocks, 1)
    for number, text in enumerate(below):
        block, y = divmod(number, len(rows))
        draw.text((left + block * panels * step_x, top + y * step_y + height * scale + 1),
                  fitting(text, panels * step_x - GAP, small), "dimgray", small)
    return np.asarray(canvas)


def paired(rows: Sequence[Sequence[np.ndarray]]) -> list[Row]:
    """Returns the rows of uint8 images two and two side by side, the second half beside the first; white fills up."""
    half = (len(rows) + 1) // 2
    blank = (np.full_like(rows[0][0], 255),) * len(rows[0])
    return [(*left, *right) for left, right in itertools.zip_longest(rows[:half], rows[half:], fillvalue=blank)]


def fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Returns the text, or as much of its end as there is room for."""
    text = text.encode("latin-1", "replace").decode("latin-1") if isinstance(font, ImageFont.ImageFont) else text
    if font.getlength(text) <= width:
        return text
    return next(short for start in range(1, len(text) + 1)
                if font.getlength(short := CUT + text[start:]) <= width or start == len(text))


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Returns the text in lines that are not wider, but for single words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
