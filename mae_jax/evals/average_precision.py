"""COCO's average precision: computed by pycocotools where it is installed, otherwise by the same rules in NumPy.

The rules are those of COCO's detection evaluation: IoU thresholds 0.50, 0.55 ... 0.95; monotone precision at 101
recalls; objects and unmatched detections limited to a range of areas; at most 100 detections per image and class. A
crowd is not an object, and a detection inside it is not a false positive. A metric is the mean over classes that have
objects.
"""

import contextlib
import functools
import importlib
import io
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mae_jax.data import rle
from mae_jax.data.objects import Region

log = logging.getLogger(__name__)

OVERLAPS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # detections per image and class
AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))  # square pixels: all, small, medium, large
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


class Mask(NamedTuple):
    """A mask in the compressed RLE format of COCO's results."""

    counts: str  # run lengths
    size: tuple[int, int]  # height, width of the image

    @classmethod
    def of(cls, region: Region, size: tuple[int, int]) -> "Mask":
        return cls(rle.encoded_region(region.values, region.left, region.top, size), size)

    def whole(self) -> np.ndarray:
        """Returns the decoded mask, bool [height, width]."""
        return rle.decoded(rle.runs(self.counts, self.size), self.size)


class Found(NamedTuple):
    """Annotated or detected objects of one image; boxes (x1, y1, x2, y2) in pixels of the original image."""

    box: np.ndarray  # float64 [n, 4]
    label: np.ndarray  # int [n]
    masks: tuple[Mask, ...] = ()
    score: np.ndarray | None = None  # float [n]; None for annotations
    area: np.ndarray | None = None  # float [n] in square pixels; None for detections
    crowd: np.ndarray | None = None  # bool [n]; None for detections


def figures(truth: Sequence[Found], detected: Sequence[Found], masks: bool) -> dict[str, float]:
    """Returns name of FIGURES → average precision in 0..1, NaN for a range of areas without objects.

    Args:
      truth, detected: annotated and detected objects of the same images, in the same order.
      masks: True for the IoU of masks, False for that of boxes.
    """
    return of_pycocotools(truth, detected, masks) if _installed() else of_numpy(truth, detected, masks)


@functools.cache
def _installed() -> bool:
    """Returns whether pycocotools is installed; logs once if it is not."""
    found = importlib.util.find_spec("pycocotools") is not None
    if not found:
        log.info("average precision is computed in NumPy; for COCO's own code: pip install 'mae_jax[coco]'")
    return found


def of_pycocotools(truth: Sequence[Found], detected: Sequence[Found], masks: bool) -> dict[str, float]:
    """Returns `figures` by pycocotools, or by `of_numpy` without any detection, which pycocotools does not accept."""
    if not any(len(found.label) for found in detected):
        return of_numpy(truth, detected, masks)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    labels = sorted({int(label) for found in (*truth, *detected) for label in found.label})
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints tables
        known = COCO()
        images = [(i, *_size(each, found)) for i, (each, found) in enumerate(zip(truth, detected, strict=True))]
        known.dataset = {"images": [{"id": i, "height": height, "width": width} for i, height, width in images],
                         "annotations": _entries(truth, masks), "info": {},
                         "categories": [{"id": label, "name": str(label)} for label in labels]}
        known.createIndex()
        judged = COCOeval(known, known.loadRes(_entries(detected, masks)), "segm" if masks else "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return dict(zip(FIGURES, (float(value) if value >= 0 else np.nan for value in judged.stats), strict=False))


def _size(*found: Found) -> tuple[int, int]:
    """Returns (height, width) of an image from its masks; (1, 1) without masks."""
    return next((mask.size for each in found for mask in each.masks), (1, 1))


def _entries(images: Sequence[Found], masks: bool) -> list[dict[str, Any]]:
    """Returns annotations or results in COCO's format; ids begin with 1, since pycocotools treats 0 as no match."""
    entries: list[dict[str, Any]] = []
    for image, found in enumerate(images):
        for k, (x1, y1, x2, y2) in enumerate(found.box.tolist()):
            entry: dict[str, Any] = {"image_id": image, "category_id": int(found.label[k]), "id": len(entries) + 1}
            if masks:  # without a box: pycocotools would take the area of a result from its box
                entry["segmentation"] = {"size": list(found.masks[k].size), "counts": found.masks[k].counts}
            if not masks or found.score is None:
                entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            if found.score is not None:
                entry["score"] = float(found.score[k])
            if found.area is not None and found.crowd is not None:
                entry |= {"area": float(found.area[k]), "iscrowd": int(found.crowd[k])}
            entries.append(entry)
    return entries


def of_numpy(truth: Sequence[Found], detected: Sequence[Found], masks: bool) -> dict[str, float]:
    """Returns `figures`, computed in NumPy."""
    tables = [precisions(truth, detected, label, masks) for label in sorted({
        int(label) for found in truth for label in found.label})]
    table = np.stack(tables) if tables else np.full((0, len(AREAS), len(OVERLAPS), len(RECALLS)), -1.0)  # [C, A, T, R]
    parts = (table[:, 0], table[:, 0, 0], table[:, 0, 5], *(table[:, area] for area in (1, 2, 3)))
    return {name: float(part[part > -1].mean()) if (part > -1).any() else np.nan
            for name, part in zip(FIGURES, parts, strict=True)}


def precisions(truth: Sequence[Found], detected: Sequence[Found], label: int, masks: bool) -> np.ndarray:
    """Returns the precision of one class, float64 [areas, overlaps, recalls]; -1 for areas without objects."""
    out = np.full((len(AREAS), len(OVERLAPS), len(RECALLS)), -1.0)
    images = [_of_class(objects, found, label, masks) for objects, found in zip(truth, detected, strict=True)]
    images = [image for image in images if len(image.score) or len(image.crowd)]
    score = np.concatenate([image.score for image in images]) if images else np.zeros(0)
    order = np.argsort(-score, kind="stable")
    for number, (low, high) in enumerate(AREAS):
        ignored = [image.crowd | (image.area < low) | (image.area > high) for image in images]
        count = sum(int((~each).sum()) for each in ignored)
        if not count:
            continue
        found = [matches(image.overlap, each, image.crowd) for image, each in zip(images, ignored, strict=True)]
        right = np.concatenate([hit for hit, _ in found], 1)[:, order]
        outside = np.concatenate([(image.found_area < low) | (image.found_area > high) for image in images])[order]
        nothing = np.concatenate([left for _, left in found], 1)[:, order] | (~right & outside)
        hits, misses = (right & ~nothing).cumsum(1), (~right & ~nothing).cumsum(1)
        for t in range(len(OVERLAPS)):
            recall, precision = hits[t] / count, hits[t] / np.maximum(hits[t] + misses[t], np.spacing(1))
            best = np.maximum.accumulate(precision[::-1])[::-1]
            place = np.searchsorted(recall, RECALLS, side="left")
            out[number, t] = np.append(best, 0.0)[place]
    return out


class _Image(NamedTuple):
    """Objects [G] and detections [D] of one class in one image; detections by descending score."""

    overlap: np.ndarray  # IoU [D, G]
    crowd: np.ndarray
    area: np.ndarray
    score: np.ndarray
    found_area: np.ndarray


def _of_class(truth: Found, found: Found, label: int, masks: bool) -> _Image:
    assert found.score is not None
    assert truth.area is not None
    assert truth.crowd is not None
    theirs, ours = np.flatnonzero(truth.label == label), np.flatnonzero(found.label == label)
    ours = ours[np.argsort(-found.score[ours], kind="stable")][:MOST]
    crowd = truth.crowd[theirs]
    if masks:
        overlap, area = mask_overlaps([found.masks[k] for k in ours], [truth.masks[k] for k in theirs], crowd)
    else:
        box = found.box[ours]
        overlap, area = box_overlaps(box, truth.box[theirs], crowd), (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    return _Image(overlap, crowd, truth.area[theirs], found.score[ours], area)


def box_overlaps(found: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Returns the IoU [D, G] of boxes [D, 4] and [G, 4]; for a crowd, the share of the detection inside the crowd."""
    low = np.maximum(found[:, None, :2], truth[None, :, :2])
    high = np.minimum(found[:, None, 2:], truth[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(2)
    area, other = ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in (found, truth))
    either = np.where(crowd, area[:, None], area[:, None] + other - both)
    return both / np.maximum(either, np.spacing(1))


def mask_overlaps(found: list[Mask], truth: list[Mask], crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the IoU [D, G] of masks, as `box_overlaps` for boxes, and the areas [D] of detected masks in pixels."""
    ours, theirs = (np.stack([mask.whole().ravel() for mask in part]).astype(np.float32) if part else None
                    for part in (found, truth))
    area = np.zeros(0) if ours is None else ours.sum(1, dtype=np.float64)
    if ours is None or theirs is None:
        return np.zeros((len(found), len(truth))), area
    both = (ours @ theirs.T).astype(np.float64)
    either = np.where(crowd, area[:, None], area[:, None] + theirs.sum(1, dtype=np.float64) - both)
    return both / np.maximum(either, 1), area


def matches(overlap: np.ndarray, ignored: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matches detections of one image and class to objects, by descending score.

    Each detection matches the unmatched object with the largest IoU; an ignored object only if no other one reaches the
    threshold.

    Args:
      overlap: IoU [D, G], detections by descending score.
      ignored: bool [G], objects that do not count.
      crowd: bool [G], objects that any number of detections may match.

    Returns:
      Two arrays bool [overlaps, D]: detections that match an object, and detections that match an ignored object.
    """
    shape = len(OVERLAPS), len(overlap)
    hit, nothing = np.zeros(shape, bool), np.zeros(shape, bool)
    for t, least in enumerate(OVERLAPS):
        free = np.ones(len(ignored), bool)
        for d, row in enumerate(overlap):
            enough = (free | crowd) & (row >= min(least, 1 - 1e-10))
            for wanted in (enough & ~ignored, enough & ignored):
                if wanted.any():
                    chosen = len(row) - 1 - np.where(wanted, row, -1.0)[::-1].argmax()  # the last one of equal IoU
                    hit[t, d], nothing[t, d], free[chosen] = True, ignored[chosen], False
                    break
    return hit, nothing
