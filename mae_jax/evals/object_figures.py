"""Drawings of objects on images: boxes, masks, class names and scores."""

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mae_jax.errors import printable
from mae_jax.evals.average_precision import Found
from mae_jax.ops.detection.crops import CROP
from mae_jax.ops.detection.instance_masks import unpack

LEAST, MOST = 256, 512  # screen pixels: minimum short side and maximum long side of a panel
SHOWN = 0.3  # minimum score of drawn detections
SHARE = 0.45  # opacity of a mask
TEXT = 11  # font size in pixels
GOLDEN = 0.618  # step in hue between successive classes, as a share of the color circle


def panel(image: np.ndarray, found: Found, classes: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """Draws objects on an image, resized to a legible size.

    Args:
      image: uint8 [h, w, 3], of any size.
      found: boxes and masks in pixels of an image of `size`; detections with a score below SHOWN are not drawn.
      classes: names of the classes.
      size: (height, width) of the image that the boxes refer to.

    Returns:
      uint8 [height, width, 3].
    """
    times = min(max(1, -(-LEAST // min(image.shape[:2]))), MOST / max(image.shape[:2]))
    shape = tuple(max(1, round(side * times)) for side in image.shape[:2])
    pixels = np.asarray(Image.fromarray(image).resize(shape[::-1], Image.Resampling.NEAREST if times > 1 else
                                                      Image.Resampling.BILINEAR)).astype(np.float32)
    shown = [k for k in range(len(found.label)) if found.score is None or found.score[k] >= SHOWN]
    for k in shown[::-1] if found.masks else ():
        mask = Image.fromarray(found.masks[k].whole()).resize(shape[::-1], Image.Resampling.NEAREST)
        where = np.asarray(mask)
        pixels[where] = (1 - SHARE) * pixels[where] + SHARE * np.array(color(int(found.label[k])))
    canvas = Image.fromarray(pixels.astype(np.uint8))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
    scale = np.tile(np.divide(shape, size)[::-1], 2)
    for k in shown[::-1]:
        x1, y1, x2, y2 = (found.box[k] * scale).tolist()
        hue, name = color(int(found.label[k])), _name(int(found.label[k]), classes)
        text = name if found.score is None else f"{name} {found.score[k]:.2f}"
        draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=hue)
        at = (min(x1, shape[1] - draw.textlength(text, font) - 2), y1 - TEXT - 3 if y1 > TEXT + 3 else y1)
        draw.rectangle(draw.textbbox((at[0] + 1, at[1]), text, font), fill="black")
        draw.text((at[0] + 1, at[1]), text, hue, font)
    return np.asarray(canvas)


def color(label: int) -> tuple[int, int, int]:
    """Returns the color (red, green, blue) of a class, in 0..255; successive classes have distinct hues."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.8, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _name(label: int, classes: Sequence[str]) -> str:
    text = printable(classes[label]) if label < len(classes) else str(label)
    return text.encode("latin-1", "replace").decode("latin-1")


def with_objects(images: np.ndarray, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Draws the boxes and masks of a batch on its images uint8 [B, height, width, 3], at whole pixels."""
    drawn = []
    for i, image in enumerate(images):
        pixels = image.astype(np.float32)
        for k in np.flatnonzero(batch["box_valid"][i]):
            x1, y1, x2, y2 = np.rint(batch["box"][i, k]).astype(int).tolist()
            x1, y1 = min(x1, pixels.shape[1] - 1), min(y1, pixels.shape[0] - 1)  # for slivers at the edge
            x2, y2, hue = max(x2, x1 + 1), max(y2, y1 + 1), np.array(color(int(batch["box_class"][i, k])), np.float32)
            cells = np.asarray(unpack(batch["box_mask"][i, k]))
            rows, columns = ((np.arange(side) + 0.5) * CROP / side for side in (y2 - y1, x2 - x1))
            mask = cells[np.ix_(rows.astype(int), columns.astype(int))]
            part = pixels[y1:y2, x1:x2]
            mask = mask[:part.shape[0], :part.shape[1]]
            part[mask] = (1 - SHARE) * part[mask] + SHARE * hue
            part[[0, -1]], part[:, [0, -1]] = hue, hue
        drawn.append(pixels.astype(np.uint8))
    return np.stack(drawn)


def object_names(batch: Mapping[str, np.ndarray], i: int, classes: Sequence[str]) -> str:
    """Returns the classes of the objects of the i-th image of a batch with their counts, such as "2 x dog, kite"."""
    labels, counts = np.unique(batch["box_class"][i][batch["box_valid"][i] > 0], return_counts=True)
    return ", ".join(f"{count} x {_name(int(label), classes)}" if count > 1 else _name(int(label), classes)
                     for label, count in zip(labels, counts, strict=True))
