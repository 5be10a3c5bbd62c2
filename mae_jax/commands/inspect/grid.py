"""A grid of the first images of a run as the model will see them, with what each is called and its class below."""

import io
from typing import TYPE_CHECKING

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from mae_jax.errors import printable
from mae_jax.storage import paths

if TYPE_CHECKING:
    from mae_jax.data import Batch, OpenedData
    from mae_jax.methods.base import Method

GRID_SIDE = 8  # images along and down the grid, at most
GAP = 2  # pixels between images of the grid
LEAST_WIDTH = 112  # pixels of an image in the grid: smaller ones are shown two, three ... times as large
LINE = 12  # pixels of a line of a caption
TEXT = 10  # pixels of its letters
CUT = "..."


def save_grid(batch: "Batch", method: "Method", opened: "OpenedData", path: epath.Path) -> None:
    """Writes the first images of a batch as a PNG, the views of each one below the other, and a caption.

    Where patches are hidden, the image is above what the encoder sees of it.
    """
    shown = _views(batch, method)
    width = max(images.shape[2] for images in shown)
    times = -(-LEAST_WIDTH // width)
    shown = [images.repeat(times, 1).repeat(times, 2) for images in shown]
    cells = []
    for i in range(len(shown[0])):
        images = [_framed(images[i], width * times) for images in shown]
        cells.append(np.concatenate([*images, _caption(caption(batch, i, opened), width * times + GAP)]))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % GRID_SIDE)
    rows = [np.concatenate(cells[i:i + GRID_SIDE], axis=1) for i in range(0, len(cells), GRID_SIDE)]
    content = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(content, "PNG")
    paths.make_folder(path.parent)
    paths.replace_bytes(path, content.getvalue())


def caption(batch: "Batch", i: int, opened: "OpenedData") -> tuple[str, str]:
    """Returns what the i-th image of a batch is called, or its number, and its class or classes, '' for none."""
    number, classes = int(batch["id"][i]), opened.info.classes
    train = getattr(opened, "train", None)  # cached batches have no names
    name = train.name(number) if train else f"{number}"
    if not batch["valid"][i]:
        return name, "cannot be read"
    present = np.flatnonzero(batch["labels"][i]) if "labels" in batch else [batch["label"][i]]
    return name, ", ".join(printable(classes[k]) if k < len(classes) else f"class {k}" for k in present if k >= 0)


def _views(batch: "Batch", method: "Method") -> list[np.ndarray]:
    """Returns images uint8 [n, height, width, 3] of each view, or of the one view and what the encoder sees of it."""
    from mae_jax.ops.patches import PatchGrid

    shown, most = [], GRID_SIDE * GRID_SIDE
    for name, n, order in [(f"{v.name}/", n, v.order) for v in method.views() for n in range(len(v.colors))]:
        patches, places = (batch[name + field][:most, n] for field in ("patches", "order"))
        shown.append(PatchGrid(*order.grid, *method.grid.patch).unpatchify(patches, places))
    if not shown:
        patches, places = (batch[field][:most] for field in ("patches", "order"))
        order = method.patch_order()
        shown = [method.grid.unpatchify(patches, places)]
        if order.num_masked:
            seen = patches.copy()
            seen[:, -order.num_masked :] = 127
            shown.append(method.grid.unpatchify(seen, places))
    return shown


def _framed(image: np.ndarray, width: int) -> np.ndarray:
    """Adds the gap below, and white on the right up to the width."""
    return np.pad(image, ((0, GAP), (0, width - image.shape[1] + GAP), (0, 0)), constant_values=255)


def _caption(lines: tuple[str, str], width: int) -> np.ndarray:
    """Draws lines of text, black on white, uint8 [lines, width, 3]; of what is too long the beginning is left out."""
    image = Image.new("RGB", (width, LINE * len(lines) + GAP), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(TEXT)
    for place, line in enumerate(lines):
        draw.text((0, place * LINE), _fitting(line, width - GAP, font), "black", font)
    return np.asarray(image)


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Returns the text, or as much of its end as there is room for."""
    text = text.encode("latin-1", "replace").decode("latin-1") if isinstance(font, ImageFont.ImageFont) else text
    if font.getlength(text) <= width:
        return text
    return next(short for start in range(1, len(text) + 1)
                if font.getlength(short := CUT + text[start:]) <= width or start == len(text))
