"""Reads annotations in COCO's format into compact arrays, and reports those that cannot be used.

A file of any size is read in pieces; the arrays that stay in memory hold mostly points of polygons.
"""

import functools
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mae_jax.data import outlines, rle
from mae_jax.data.objects import Objects, Region, tight
from mae_jax.errors import UserError, pluralize, printable
from mae_jax.runtime import bounded_json

log = logging.getLogger(__name__)

LISTS = ("images", "annotations", "categories")
NO_OUTLINE, POLYGONS, RUNS = 0, 1, 2  # representations of an annotation's mask
NOTHING = np.zeros(0, np.float32)
MAX_NAMED = 8  # annotations listed in a line
BEYOND = 1.0  # pixels by which a box may exceed its image without a warning
FAR = 8  # image sides; a point farther from the image's center is a mistake, and can crash COCO's routine
CUT, BOX_ALONE = "bbox reaches beyond the image, and is cut", "no outline, for which the bbox stands in"
SAME_ID, PART = "id of several annotations", "outline with a part that is none, which is left out"
KEPT = (CUT, BOX_ALONE, SAME_ID, PART)  # faults of annotations that are used nevertheless


class Images(NamedTuple):
    """The usable images of a file."""

    ids: np.ndarray  # int64 [n]
    names: list[str]
    sizes: np.ndarray  # int32 [n, 2], height and width in pixels


@dataclass
class Table:
    """The usable annotations of a file, ordered by image.

    Attributes:
      images: n images.
      category_ids, classes: ids and names of the categories, sorted by id.
      first: int64 [n + 1]; image i has the annotations first[i] to first[i + 1] - 1.
      label: int32 [m], indices of categories.
      crowd: bool [m].
      area: float32 [m], square pixels of the mask.
      box: float32 [m, 4], x1, y1, x2, y2 in pixels, clipped to the image.
      extent: float32 [m, 4], the same around the outline.
      kind: int8 [m], representation of the mask.
      span: int64 [m, 2], range of the mask in `points` or `runs`.
      points: float32 [...], x, y, x, y ...; NaN between the parts of an outline.
      runs: int32 [...].
      faults: kind of fault → ids of annotations, or of images, with the name of the image.
    """

    images: Images
    category_ids: tuple[int, ...]
    classes: tuple[str, ...]
    first: np.ndarray
    label: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    box: np.ndarray
    extent: np.ndarray
    kind: np.ndarray
    span: np.ndarray
    points: np.ndarray
    runs: np.ndarray
    faults: dict[str, list[str]]

    def objects(self, i: int, as_annotated: bool = False) -> Objects:
        """Returns the objects of the i-th image, with boxes around the masks, or as annotated."""
        size = (int(self.images.sizes[i, 0]), int(self.images.sizes[i, 1]))
        part = slice(int(self.first[i]), int(self.first[i + 1]))
        made = [self._mask(k, size) for k in range(part.start, part.stop)]
        box = self.box[part] if as_annotated or not made else np.stack([box for box, _ in made])
        return Objects(size, box, self.label[part], self.crowd[part], self.area[part],
                       tuple(region for _, region in made))

    def _mask(self, k: int, size: tuple[int, int]) -> tuple[np.ndarray, Region]:
        """Returns the box around an annotation's mask, float32 [4], and the mask."""
        start, stop = self.span[k]
        if self.kind[k] == POLYGONS:
            points = self.points[start:stop]
            parts = [points[begin:end] for begin, end in _between(np.flatnonzero(np.isnan(points)), len(points))]
            return self.extent[k], outlines.region(parts, self.extent[k])
        if self.kind[k] == RUNS:
            mask = rle.decoded(self.runs[start:stop], size)
            left, top, right, bottom = tight(mask)
            region = Region(left, top, np.ascontiguousarray(mask[top:bottom, left:right]))
            return np.array((left, top, right, bottom), np.float32), region
        left, top = np.floor(self.box[k, :2]).astype(int)
        width, height = np.maximum(np.ceil(self.box[k, 2:]).astype(int) - (left, top), 1)
        return self.box[k], Region(int(left), int(top), np.ones((height, width), bool))

    @property
    def outlined(self) -> bool:
        """Whether any annotation has an outline."""
        return bool((self.kind != NO_OUTLINE).any())


def _between(gaps: np.ndarray, end: int) -> list[tuple[int, int]]:
    return list(zip([0, *(gaps + 1)], [*gaps, end], strict=True))


@functools.lru_cache(maxsize=4)  # every split of a run opens the file
def read(file: epath.Path) -> Table:
    """Reads a file; logs a line per kind of fault with the annotations that have it.

    Raises:
      UserError: the file is no annotation file, or none of its annotations is usable.
    """
    entries: dict[str, list[Any]] = {"images": [], "categories": []}
    columns, missing = _Columns(), set(LISTS)
    try:
        with file.open("rb") as opened:
            for name, entry in bounded_json.listed(opened, LISTS):
                missing.discard(name)
                if name == "annotations":
                    columns.add(entry)
                elif name == "images":
                    entries[name].append(_kept(entry, ("id", "file_name", "height", "width")))
                else:
                    entries[name].append(_kept(entry, ("id", "name")))
    except ValueError as error:
        raise UserError(f"{file} is not a file of COCO annotations: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    if missing & {"images", "categories"}:
        raise UserError(f"{file} is not a file of COCO annotations: it has no {' and no '.join(sorted(missing))}")
    images, faults = _images(entries["images"])
    ids, classes = _categories(entries["categories"], file)
    table = columns.table(images, ids, classes, faults)
    for line in told(table.faults, file):
        log.warning(line)
    if not len(table.label) and "annotations" not in missing:
        raise UserError(f"{file}: none of its {columns.count} annotations can be used")
    return table


def told(faults: dict[str, list[str]], file: epath.Path) -> list[str]:
    """Returns a line per kind of fault."""
    lines = []
    for what, names in faults.items():
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        used = "used" if what in KEPT else "not used"
        lines.append(f"{file}: {what} ({pluralize(len(names), 'time')}, {used}): {', '.join(names[:MAX_NAMED])}{more}")
    return lines


def _kept(entry: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(entry.get(name) for name in names) if isinstance(entry, dict) else (None,) * len(names)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _images(entries: Sequence[tuple[Any, ...]]) -> tuple[Images, dict[str, list[str]]]:
    """Returns the usable images, and the faults of the others."""
    faults: dict[str, list[str]] = {}
    found: dict[int, tuple[str, int, int]] = {}
    for place, (number, name, height, width) in enumerate(entries):
        shown = f"image {number if _whole(number) else f'#{place}'}"
        if not _whole(number) or not isinstance(name, str) or not name:
            faults.setdefault("image without id or file_name", []).append(shown)
        elif not (_whole(height) and _whole(width) and 0 < height < 2**31 and 0 < width < 2**31):
            faults.setdefault("image without height and width", []).append(f"{shown} ({printable(name)})")
        elif number in found:
            faults.setdefault("image with the id of another", []).append(f"{shown} ({printable(name)})")
        else:
            found[number] = (name, height, width)
    sizes = np.array([each[1:] for each in found.values()], np.int32).reshape(-1, 2)
    return Images(np.fromiter(found, np.int64, len(found)), [each[0] for each in found.values()], sizes), faults


def _categories(entries: Sequence[tuple[Any, ...]], file: epath.Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns ids and names of the categories, sorted by id; raises UserError."""
    if not entries:
        raise UserError(f"{file} has no categories")
    for number, name in entries:
        if not _whole(number) or not isinstance(name, str):
            raise UserError(f"{file}: a category needs a whole number as id, and a name; one has {number!r:.40} and "
                            f"{name!r:.40}")
    ids = [number for number, _ in entries]
    if len(set(ids)) < len(ids):
        raise UserError(f"{file}: two categories have the id {max(ids, key=ids.count)}")
    ordered = sorted(entries)
    return tuple(number for number, _ in ordered), tuple(name for _, name in ordered)


@dataclass
class _Columns:
    """Annotations in file order, before images and categories are known."""

    ids: array = field(default_factory=lambda: array("q"))
    images: array = field(default_factory=lambda: array("q"))
    categories: array = field(default_factory=lambda: array("q"))
    crowd: array = field(default_factory=lambda: array("b"))
    area: array = field(default_factory=lambda: array("f"))
    box: array = field(default_factory=lambda: array("f"))
    extent: array = field(default_factory=lambda: array("f"))
    kind: array = field(default_factory=lambda: array("b"))
    span: array = field(default_factory=lambda: array("q"))
    size: array = field(default_factory=lambda: array("i"))  # image size declared by runs
    points: array = field(default_factory=lambda: array("f"))
    runs: array = field(default_factory=lambda: array("i"))
    faults: list[tuple[Any, ...]] = field(default_factory=list)  # kind of fault, id, image id, perhaps more
    count: int = 0
    partly: bool = False  # whether only some parts of the last outline are used

    def add(self, entry: Any) -> None:
        """Adds an annotation, or its fault."""
        self.count += 1
        number, image, category, crowd, area, box, outline = _kept(
            entry, ("id", "image_id", "category_id", "iscrowd", "area", "bbox", "segmentation"))
        number = number if _whole(number) else -self.count
        before, self.partly = (len(self.points), len(self.runs)), False
        try:
            if not _whole(image) or not _whole(category):
                raise ValueError("no whole number as image_id and category_id")
            corners = _corners(box)
            kind, extent, pixels, size = self._mask(outline)
            if corners is None and kind == RUNS:
                lengths = np.array(self.runs[before[1]:], np.int64)
                extent = tight(rle.decoded(lengths, size))
        except ValueError as error:
            del self.points[before[0]:], self.runs[before[1]:]
            self.faults.append((str(error), number, image if _whole(image) else 0))
            return
        corners = corners if corners is not None else extent
        if corners is None:
            self.faults.append(("neither a bbox nor an outline", number, image))
            return
        if self.partly:
            self.faults.append((PART, number, image))
        extent = corners if extent is None else extent
        self.ids.append(number), self.images.append(image), self.categories.append(category)
        self.crowd.append(bool(crowd)), self.kind.append(kind), self.size.extend(size)
        self.box.extend(corners), self.extent.extend(extent)
        given = isinstance(area, int | float) and 0 < area < float("inf")
        self.area.append(float(area) if given else pixels or (corners[2] - corners[0]) * (corners[3] - corners[1]))
        where = (before[1], len(self.runs)) if kind == RUNS else (before[0], len(self.points))
        self.span.extend(where)

    def _mask(self, outline: Any) -> tuple[int, tuple[float, ...] | None, float, tuple[int, int]]:
        """Stores a mask; returns its kind, extent, area and, for runs, the image's size.

        Raises:
          ValueError: the outline is invalid; the text is the kind of fault.
        """
        if isinstance(outline, dict):
            size = outline.get("size")
            if not (isinstance(size, list) and len(size) == 2 and all(_whole(n) and 0 < n < 2**20 for n in size)
                    and isinstance(outline.get("counts"), list | str)):
                raise ValueError("run-length mask without size and counts")
            try:
                lengths = rle.runs(outline["counts"], (size[0], size[1]))
            except (ValueError, OverflowError) as error:
                raise ValueError(f"run-length mask that does not fill its size: {error}") from None
            if not lengths[1::2].any():
                raise ValueError("mask without a pixel")
            self.runs.frombytes(lengths.astype(np.int32).tobytes())
            return RUNS, None, float(lengths[1::2].sum()), (size[0], size[1])
        if not outline:
            return NO_OUTLINE, None, 0.0, (0, 0)
        if not isinstance(outline, list):
            raise ValueError("outline that is neither a list nor run lengths")
        given = [_points(part) for part in (outline if isinstance(outline[0], list) else [outline])]
        areas = [_area(part) for part in given]
        parts = [part for part, area in zip(given, areas, strict=True) if area > 0]
        if not parts:
            raise ValueError("outline of no area" if any(map(len, given)) else "outline of fewer than 3 points")
        self.partly = len(parts) < len(given)
        for part in parts[:-1]:
            self.points.frombytes(np.append(part, np.float32(np.nan)).tobytes())
        self.points.frombytes(parts[-1].tobytes())
        points = (np.concatenate(parts) if len(parts) > 1 else parts[0]).reshape(-1, 2)
        return POLYGONS, (*points.min(0).tolist(), *points.max(0).tolist()), sum(areas), (0, 0)

    def table(self, images: Images, ids: tuple[int, ...], classes: tuple[str, ...],
              faults: dict[str, list[str]]) -> Table:
        """Returns the usable annotations, by image."""
        image, known = _places(images.ids, np.array(self.images, np.int64))
        label, meant = _places(np.array(ids, np.int64), np.array(self.categories, np.int64))
        numbers, kind = np.array(self.ids, np.int64), np.array(self.kind, np.int8)
        box, extent = (np.array(each, np.float32).reshape(-1, 4) for each in (self.box, self.extent))
        size = np.array(self.size, np.int32).reshape(-1, 2)
        of = images.sizes[image] if len(images.ids) else np.zeros((len(image), 2), np.int32)
        limits = np.tile(of[:, ::-1], 2).astype(np.float32)
        cut, cut_extent = (np.clip(each, 0, limits) for each in (box, extent))
        sized = (box[:, 2:] > box[:, :2]).all(1)
        inside = (cut[:, 2:] > cut[:, :2]).all(1) & (cut_extent[:, 2:] > cut_extent[:, :2]).all(1)
        meet = (np.minimum(box, extent)[:, 2:] > np.maximum(box, extent)[:, :2]).all(1)
        reach = np.abs(extent - limits / 2).max(1, initial=0)
        stray = (kind == POLYGONS) & (reach > FAR * limits.max(1, initial=0))
        _, at, times = np.unique(numbers, return_inverse=True, return_counts=True)
        self.faults += [("category_id of no category", int(numbers[k]), self.images[k],
                         f"category_id {self.categories[k]}") for k in np.flatnonzero(~meant)]
        usable = meant.copy()
        for what, bad in (
                ("image_id of no image", ~known), ("bbox of no width or height", ~sized),
                ("bbox or outline outside the image", known & ~inside),
                ("run-length mask of another size than the image", known & (kind == RUNS) & (size != of).any(1)),
                ("outline with a point far outside the image", known & stray),
                ("bbox and outline that do not meet", (kind == POLYGONS) & ~meet)):
            self.faults += [(what, int(numbers[k]), self.images[k]) for k in np.flatnonzero(usable & bad)]
            usable &= ~bad
        for what, odd in ((CUT, np.abs(box - cut).max(1, initial=0) > BEYOND), (BOX_ALONE, kind == NO_OUTLINE),
                          (SAME_ID, times[at] > 1)):
            self.faults += [(what, int(numbers[k]), self.images[k]) for k in np.flatnonzero(usable & odd)]
        names = dict(zip(images.ids.tolist(), images.names, strict=True)) if self.faults else {}
        for what, number, image_id, *more in self.faults:
            shown = f"annotation {number}" if number >= 0 else f"the annotation #{-number - 1}"
            said = [printable(names.get(image_id, f"image {image_id}")), *more]
            faults.setdefault(what, []).append(f"{shown} ({', '.join(said)})")
        order = np.flatnonzero(usable)[np.argsort(image[usable], kind="stable")]
        first = np.searchsorted(image[order], np.arange(len(images.ids) + 1))
        return Table(images, ids, classes, first, label[order].astype(np.int32), np.array(self.crowd, bool)[order],
                     np.array(self.area, np.float32)[order], cut[order], cut_extent[order], kind[order],
                     np.array(self.span, np.int64).reshape(-1, 2)[order], np.array(self.points, np.float32),
                     np.array(self.runs, np.int32), faults)


def _places(ids: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index in `ids` of each wanted id, int64 [k], and whether it exists, bool [k]."""
    if not len(ids):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    order = np.argsort(ids)
    place = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
    return place, ids[place] == wanted


def _corners(box: Any) -> tuple[float, float, float, float] | None:
    """Converts COCO's x, y, width, height to x1, y1, x2, y2; None without a box; raises ValueError."""
    if box is None or box == []:
        return None
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(n, int | float) and abs(n) < 1e9 for n in box)):
        raise ValueError("bbox that is not four numbers")
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def _points(part: Any) -> np.ndarray:
    """Returns the points of a part of an outline, float32 [2 k]; none if it is invalid."""
    try:
        points = np.array(part, np.float32)
    except (ValueError, TypeError, OverflowError):
        points = NOTHING
    return points if points.ndim == 1 and len(points) >= 6 and not len(points) % 2 and np.isfinite(
        points).all() else NOTHING


def _area(points: np.ndarray) -> float:
    """Returns the area of a part of an outline, in square pixels (shoelace formula)."""
    if not len(points):
        return 0.0
    x, y = points.reshape(-1, 2).T.astype(np.float64)
    x, y = x - x[0], y - y[0]  # makes the term from the last point to the first 0
    return float(abs(x[:-1] @ y[1:] - y[:-1] @ x[1:]) / 2)
