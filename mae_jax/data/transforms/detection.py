"""Views of images with objects: which part of the image is shown at which size on the canvas, and its objects there.

The image lies in the canvas's top left corner; the rest has the mean color. Every random choice comes from the
generator that is passed in. Crop and resize are one operation: PIL's resize takes a box in fractions of pixels.
"""

import functools
import logging
import math
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mae_jax import plugins
from mae_jax.data.decode import SIDEWAYS, BadImage, StoredImage
from mae_jax.data.objects import Objects, Region, none, tight
from mae_jax.data.transforms.color import COLOR_POLICIES, Moving, policy
from mae_jax.errors import UserError, did_you_mean
from mae_jax.ops.detection import crops

log = logging.getLogger(__name__)

AUGMENT = ("none", "lsj", "multi_scale")  # values of data.augment that support objects
AROUND = (124, 116, 104)  # ImageNet's mean color in whole numbers: 0 after normalizing, up to rounding
LEAST_SIDE = 1e-5  # pixels of the canvas that a box must exceed (detectron2's filter_empty_instances)
# DETR's multi-scale augmentation, as in XCiT's and iBOT's Mask R-CNN, in pixels for a long side of at most 1333. This
# is a canvas of 1344, the next multiple of 32; on another canvas, all lengths scale in proportion.
MULTI_SCALE_CANVAS, LONG = 1344, 1333
SHORT = tuple(range(480, 801, 32))
FIRST_SHORT, CROP = (400, 500, 600), (384, 600)


class Placement(NamedTuple):
    """A part of an image, and its size on the canvas."""

    part: tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image
    size: tuple[int, int]  # height, width in pixels of the canvas
    flip: bool = False  # mirror left and right

    def boxes(self, box: np.ndarray) -> np.ndarray:
        """Converts boxes, float [n, 4], from pixels of the image to pixels of the canvas."""
        left, top, right, bottom = self.part
        height, width = self.size
        x = (box[:, 0::2] - left) * (width / (right - left))
        y = (box[:, 1::2] - top) * (height / (bottom - top))
        x = width - x[:, ::-1] if self.flip else x
        return np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)


def check(config: ConfigDict) -> None:
    """Raises UserError for transforms that do not support objects."""
    data = config.data
    if data.augment not in AUGMENT:
        raise UserError(f"data.augment={data.augment!r} leaves boxes behind; {did_you_mean(data.augment, AUGMENT)}")
    if data.resize != "exact":
        raise UserError(f"data.resize={data.resize!r}: images with objects are resized by 'exact' alone")
    if tuple(config.eval.crop_ratio) != (1.0,):
        raise UserError(f"eval.crop_ratio={tuple(config.eval.crop_ratio)}: objects are looked for in whole images; "
                        "expected (1.0,)")
    if isinstance(plugins.find("color_policies", data.color, COLOR_POLICIES, "data.color"), Moving):
        raise UserError(f"data.color={data.color!r} moves pixels and leaves boxes behind; take one that changes "
                        "colors alone")


def augment(stored: StoredImage, objects: Objects | None, rng: np.random.Generator, config: ConfigDict,
            most: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns a training view by data.augment, data.flip and data.color, uint8 [H, W, 3], and its `fields`.

    Raises:
      BadImage: the pixels do not decode, or the objects belong to another image.
    """
    data, canvas = config.data, tuple(config.data.image_size)
    size = (stored.height, stored.width)
    flip = data.augment != "none" and data.flip and rng.random() < 0.5
    if data.augment == "lsj":
        place = lsj(size, canvas, tuple(data.lsj_scale), rng.random(), rng.random(), flip)
    elif data.augment == "multi_scale":
        place = multi_scale(size, canvas, rng, flip)
    else:
        place = whole(size, canvas)
    return _view(stored, objects, place, canvas, most, functools.partial(policy(data.color), rng=rng))


def evaluate(stored: StoredImage, objects: Objects | None, config: ConfigDict,
             most: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the evaluation's view: the whole image; otherwise as `augment`.

    It is as large as the canvas allows, or of the largest size of multi_scale, as the protocols that train with it do.
    """
    place = evaluation_placement((stored.height, stored.width), config)
    return _view(stored, objects, place, tuple(config.data.image_size), most)


def evaluation_placement(size: tuple[int, int], config: ConfigDict) -> Placement:
    """Returns where `evaluate` shows an image (height, width)."""
    canvas = tuple(config.data.image_size)
    return largest_of_scales(size, canvas) if config.data.augment == "multi_scale" else whole(size, canvas)


def whole(size: tuple[int, int], canvas: tuple[int, int]) -> Placement:
    """Places a whole image (height, width) so that it just fits into the canvas (height, width).

    On a square canvas, this is detectron2's ResizeShortestEdge(side, side).
    """
    (height, width), scale = size, min(canvas[0] / size[0], canvas[1] / size[1])
    fitted = [min(max(int(length * scale + 0.5), 1), most) for length, most in zip(size, canvas, strict=True)]
    return Placement((0.0, 0.0, float(width), float(height)), (fitted[0], fitted[1]))


def lsj(size: tuple[int, int], canvas: tuple[int, int], scale: tuple[float, float], r: float, u: float,
        flip: bool) -> Placement:
    """Places an image by ViTDet's large-scale jittering.

    This is detectron2's random flip, ResizeScale(*scale) and FixedSizeCrop(canvas, pad=False).

    Args:
      size: height, width of the image.
      canvas: height, width.
      scale: least and largest share of the canvas; (0.1, 2.0) in ViTDet.
      r: in [0, 1): position between the two scales.
      u: in [0, 1): offset of the crop if the image exceeds the canvas; one number for both axes, as in detectron2.
      flip: whether to mirror the image first.
    """
    share = scale[0] + (scale[1] - scale[0]) * r
    factor = min(canvas[0] * share / size[0], canvas[1] * share / size[1])
    resized = np.maximum(np.round(np.multiply(size, factor)).astype(int), 1)
    first = np.round(np.maximum(resized - canvas, 0) * u).astype(int)
    shown = np.minimum(resized, canvas)
    return _cut(size, resized, first, shown, flip)


def _cut(size: tuple[int, int], resized: np.ndarray, first: np.ndarray, shown: np.ndarray, flip: bool) -> Placement:
    """Places the crop [first, first + shown) of the resized image, mirrored or not."""
    (top, left), (bottom, right) = first / resized * size, np.minimum((first + shown) / resized, 1) * size
    if flip:
        left, right = size[1] - right, size[1] - left
    return Placement((float(left), float(top), float(right), float(bottom)), (int(shown[0]), int(shown[1])), flip)


def multi_scale(size: tuple[int, int], canvas: tuple[int, int], rng: np.random.Generator, flip: bool) -> Placement:
    """Places an image by DETR's multi-scale augmentation: flip, then one of two branches, equally likely.

    One resizes the short side to one of 480, 512, ..., 800, with the long side at most 1333. The other resizes the
    short side to 400, 500 or 600, crops with sides uniform in 384 to 600, and resizes the crop like the first. All
    lengths are in proportion to the canvas.
    """
    unit = min(canvas) / MULTI_SCALE_CANVAS
    if rng.random() < 0.5:
        part = np.array([0.0, 0.0, *size])  # top, left, bottom, right in pixels of the image
    else:
        resized = _keeping_ratio(size, int(rng.choice(FIRST_SHORT)) * unit, LONG * unit, canvas)
        low, high = (np.minimum(resized, max(round(bound * unit), 1)) for bound in CROP)
        shown = rng.integers(low, high + 1)
        first = rng.integers(0, resized - shown + 1)
        part = np.concatenate([first, first + shown]) / np.tile(resized, 2) * np.tile(size, 2)
    height, width = (part[2:] - part[:2]).tolist()
    shape = _keeping_ratio((height, width), int(rng.choice(SHORT)) * unit, LONG * unit, canvas)
    top, left, bottom, right = part.tolist()
    if flip:
        left, right = size[1] - right, size[1] - left
    return Placement((max(left, 0.0), top, min(right, float(size[1])), min(bottom, float(size[0]))),
                     (int(shape[0]), int(shape[1])), flip)


def largest_of_scales(size: tuple[int, int], canvas: tuple[int, int]) -> Placement:
    """Places a whole image with a short side of 800, or a long one of 1333, in proportion to the canvas."""
    unit = min(canvas) / MULTI_SCALE_CANVAS
    shape = _keeping_ratio(size, SHORT[-1] * unit, LONG * unit, canvas)
    return Placement((0.0, 0.0, float(size[1]), float(size[0])), (int(shape[0]), int(shape[1])))


def _keeping_ratio(size: tuple[float, float], short: float, long: float, canvas: tuple[int, int]) -> np.ndarray:
    """Returns height and width, int [2], scaled to the short side, or to the long side if that would be exceeded."""
    scale = min(short / min(size), long / max(size))
    return np.clip(np.floor(np.multiply(size, scale) + 0.5).astype(int), 1, canvas)


def _view(stored: StoredImage, objects: Objects | None, place: Placement, canvas: tuple[int, int], most: int,
          color: functools.partial | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    if objects is not None:
        check_size(stored, objects)
    height, width = place.size
    image = stored.whole().resize((width, height), Image.Resampling.BILINEAR, place.part)
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if place.flip else image
    image = color(image, mask=None)[0] if color else image
    pixels = np.full((*canvas, 3), AROUND, np.uint8)
    pixels[:height, :width] = np.asarray(image)
    return pixels, fields(objects or none(place.size), place, (stored.height, stored.width), most)


def check_size(stored: StoredImage, objects: Objects) -> None:
    """Raises BadImage if the objects belong to an image of another size, or possibly of another orientation."""
    size = (stored.height, stored.width)
    if stored.turn is not None and objects.size == size and (size[0] == size[1] or stored.turn not in SIDEWAYS):
        raise BadImage("EXIF turns it, and nothing tells whether its objects are turned already; store it upright, or "
                       "take data.exif=ignore")
    if objects.size != size:
        raise BadImage(f"it is {size[1]} x {size[0]}, and its objects are of an image of {objects.size[1]} x "
                       f"{objects.size[0]}")


def empty(canvas: tuple[int, int], most: int) -> dict[str, np.ndarray]:
    """Returns the fields of a gray stand-in image, which has no objects."""
    return fields(none(canvas), Placement((0.0, 0.0, *canvas[::-1]), canvas), canvas, most)


def fields(objects: Objects, place: Placement, original: tuple[int, int], most: int) -> dict[str, np.ndarray]:
    """Returns the batch fields of the objects in a view; crowds are left out.

    Args:
      objects: of the image.
      place: the view.
      original: height, width of the image.
      most: M; of more objects, the first M are kept, with a warning.

    Returns:
      `box` float32 [M, 4], `box_class` int32 [M], `box_valid` float32 [M], `box_mask` uint8 [M, 1568]: of each visible
      object; unused rows are 0. `size` and `original_size` int32 [2]: height, width.
    """
    box, label = np.zeros((most, 4), np.float32), np.zeros(most, np.int32)
    valid, masks = np.zeros(most, np.float32), np.zeros((most, crops.PACKED), np.uint8)
    count = 0
    for i in np.flatnonzero(~objects.crowd):
        seen = visible(objects.box[i], objects.regions[i], place.part)
        placed = None if seen is None else place.boxes(seen[None])[0]
        if placed is None or min(placed[2] - placed[0], placed[3] - placed[1]) <= LEAST_SIDE:
            continue
        if count == most:
            _tell_more(most)
            break
        box[count] = np.clip(placed, 0, (place.size[1], place.size[0]) * 2)
        label[count], valid[count] = objects.label[i], 1
        cells = resampled(objects.regions[i], seen)
        masks[count] = crops.pack(cells[:, ::-1] if place.flip else cells)
        count += 1
    return {"box": box, "box_class": label, "box_valid": valid, "box_mask": masks,
            "size": np.array(place.size, np.int32), "original_size": np.array(original, np.int32)}


@functools.cache
def _tell_more(most: int) -> None:
    log.warning("an image has more than data.max_objects=%d objects; of such images the first %d are trained on", most,
                most)


def visible(box: np.ndarray, region: Region, part: tuple[float, float, float, float]) -> np.ndarray | None:
    """Returns the box around the visible part of an object, float64 [4]; None if nothing is visible.

    A side whose outermost mask pixels are visible keeps its fractional coordinate in `box`; another side moves to the
    outermost visible mask pixel.
    """
    corner, cells = (region.left, region.top) * 2, region.values
    rows, columns = cells.shape
    left, top = (max(math.floor(part[k]) - corner[k], 0) for k in (0, 1))
    right, bottom = min(math.ceil(part[2]) - corner[0], columns), min(math.ceil(part[3]) - corner[1], rows)
    if left >= right or top >= bottom:
        return None
    if (left, top, right, bottom) == (0, 0, columns, rows):
        found = np.asarray(box, np.float64)
    else:
        inside = cells[top:bottom, left:right]
        if not inside.any():
            return None
        now = np.add(tight(inside), (left, top) * 2)
        found = np.where(now == tight(cells), box, now + corner).astype(np.float64)
    found = np.concatenate([np.maximum(found[:2], part[:2]), np.minimum(found[2:], part[2:])])
    return found if (found[2:] > found[:2]).all() else None


def resampled(region: Region, box: np.ndarray) -> np.ndarray:
    """Returns an object's mask in the frame of a box of its image, bool [112, 112]: cells at least half covered."""
    rows, columns = region.values.shape
    corner = np.array((region.left, region.top) * 2)
    frame = np.clip(box - corner, 0, (columns, rows) * 2)
    if not (frame[2:] > frame[:2]).all():
        return np.zeros((crops.CROP, crops.CROP), bool)
    values = Image.fromarray(region.values.astype(np.uint8) * 255)
    return np.asarray(values.resize((crops.CROP, crops.CROP), Image.Resampling.BILINEAR, tuple(frame.tolist()))) >= 128
