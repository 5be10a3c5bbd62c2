"""Detections on the host: boxes in pixels of the original images, masks in COCO's run-length encoding."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mae_jax.data.objects import Objects, Region
from mae_jax.evals.average_precision import Found, Mask
from mae_jax.ops import example_ids
from mae_jax.ops.detection.instance_masks import paste

FIELDS = ("id", "size", "original_size")  # batch fields that `compact` needs besides the detections


class Detected(NamedTuple):
    """The detections of one image."""

    id: int  # of the example
    size: tuple[int, int]  # height, width of the image
    found: Found  # boxes in pixels of the original image, by descending score
    crowded: float  # (region, class) pairs beyond the number of candidates of an image


def compact(rows: Mapping[str, np.ndarray]) -> list[Detected]:
    """Returns the detections of each image, on the host.

    Args:
      rows: arrays [n, ...] of n valid images: the result of `Detection.detections`, and the batch fields FIELDS.
    """
    ids = example_ids.whole(rows["id"])
    return [_of_image(int(ids[i]), {name: value[i] for name, value in rows.items()}) for i in range(len(ids))]


def _of_image(number: int, row: dict[str, Any]) -> Detected:
    size = int(row["original_size"][0]), int(row["original_size"][1])
    scale = np.tile((row["original_size"] / row["size"])[::-1], 2)
    there = row["detected"] > 0
    box = row["box"][there].astype(np.float64) * scale
    masks = tuple(pasted(mask, each, size) for mask, each in zip(row["mask"][there], box, strict=True))
    found = Found(box, row["box_class"][there], masks, row["score"][there].astype(np.float64))
    return Detected(number, size, found, float(row.get("crowded", 0.0)))


def pasted(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> Mask:
    """Pastes a mask into an image.

    Args:
      mask: probabilities [28, 28] in the frame of the box.
      box: float [4], (x1, y1, x2, y2) in pixels of the image.
      size: (height, width) of the image.

    Returns:
      The pixels with a probability above 0.5. Only pixels inside the box are computed: no other ones exceed 0.5.
    """
    left, top = (int(max(np.floor(low), 0)) for low in box[:2])
    right, bottom = (int(min(np.ceil(high), most)) for high, most in zip(box[2:], size[::-1], strict=True))
    if right <= left or bottom <= top:
        return Mask.of(Region(0, 0, np.zeros((0, 0), bool)), size)
    values = paste(mask, box - np.array((left, top) * 2), (bottom - top, right - left))
    return Mask.of(Region(left, top, values), size)


def annotated(objects: Objects) -> Found:
    """Returns the annotated objects of an image as `Found`, the format that average precision compares."""
    return Found(objects.box.astype(np.float64), objects.label, tuple(
        Mask.of(region, objects.size) for region in objects.regions), None, objects.area.astype(np.float64),
        objects.crowd)


def results(detected: list[Detected], image_ids: list[int], category_ids: tuple[int, ...]) -> list[dict[str, Any]]:
    """Returns the detections in COCO's format of results: boxes (x, y, width, height) in pixels of the images."""
    entries = []
    for each, image_id in zip(detected, image_ids, strict=True):
        found = each.found
        assert found.score is not None
        for (x1, y1, x2, y2), label, mask, score in zip(found.box.tolist(), found.label, found.masks, found.score,
                                                        strict=True):
            entries.append({
                "image_id": image_id, "category_id": category_ids[int(label)], "score": round(float(score), 5),
                "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
                "segmentation": {"size": list(mask.size), "counts": mask.counts}})
    return entries
