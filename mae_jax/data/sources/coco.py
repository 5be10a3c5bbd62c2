"""data.source=coco: images with objects in COCO's format, as folders of images and annotation files.

docs/detection_data.md describes the layouts. The classes are the categories, sorted by id, with or without gaps. Images
without an object are left out of a training split, as in detectron2, but not of other splits. The mask of an object
without an outline is its box.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.data import objects, outlines
from mae_jax.data.decode import read_file
from mae_jax.data.objects import Annotations, Truth
from mae_jax.data.sources import coco_annotations, coco_files, splits
from mae_jax.data.sources.base import Example, Source, printable_name
from mae_jax.data.sources.coco_annotations import Table
from mae_jax.errors import UserError, pluralize, printable
from mae_jax.storage.paths import locate

log = logging.getLogger(__name__)
MAX_NAMED = 5  # images listed in a line


def load(data: ConfigDict, split: splits.Split) -> Source:
    """Opens a split, or a slice of it; logs which images are left out.

    Raises:
      UserError: the split has no annotations, they are unreadable, or none of its images exists.
    """
    root = _path(data)
    found = coco_files.layout(root)
    file = found.file(split.name)
    table = _table(data, file)
    _check_classes(data, found, file, table)
    chosen = np.arange(len(table.images.names))
    if "" in found.files:
        chosen = splits.within(table.images.names, *splits.part(split.name, splits.holds_out(data)))
    folder, names, there = _files(file, found.root)
    start, stop = split.bounds(len(chosen))
    chosen = chosen[start:stop]
    chosen = _told(chosen, there[chosen], table, f"{file}: {{}} of {str(split)!r} missing in {folder}, and left out")
    if str(split) in map(str, splits.parts(data.train_split)):
        counts, crowds = _objects(table), _crowds(table)
        if chosen.size and not counts[chosen].any():
            raise UserError(f"{file}: no image of {str(split)!r} has an object{crowds and f': {crowds}'}")
        if crowds:
            log.warning("%s: %s", file, crowds)
        chosen = _told(chosen, counts[chosen] > 0, table, f"{file}: {{}} of {str(split)!r} without an object, and left "
                       "out of training")
        _told(chosen, counts[chosen] <= data.max_objects, table,
              f"{file}: {{}} of {str(split)!r} with more than data.max_objects={data.max_objects} objects, of which "
              "the first are trained on")
    source = Source(len(names), functools.partial(_read, table, folder, names), functools.partial(
        printable_name, names), table.classes, objects.FIELDS, annotations=Annotations(
        functools.partial(_truth, table), table.category_ids, table.outlined))
    return source.only(chosen)


def _table(data: ConfigDict, file: epath.Path) -> Table:
    """Returns the annotations of a file, in which crowds are objects where data.crowds says so."""
    table = coco_annotations.read(file)
    if data.crowds == "objects":
        return dataclasses.replace(table, crowd=np.zeros_like(table.crowd))
    return table


def _crowds(table: Table) -> str:
    """Says how many annotations are crowds, since some programs call every mask one; '' if none is."""
    if not table.crowd.any():
        return ""
    return (f"{table.crowd.sum()} of {pluralize(len(table.crowd), 'annotation')} are crowds (iscrowd=1), and not "
            "trained on. If each is one object, as CVAT writes masks that were drawn by brush, set data.crowds=objects")


def _check_classes(data: ConfigDict, found: coco_files.Layout, file: epath.Path, table: Table) -> None:
    """Raises UserError if a file has other classes than the training split, whose labels would then differ."""
    for part in splits.parts(data.train_split):
        other = found.files.get(splits.role(part.name), file)
        classes = coco_annotations.read(other).classes
        if classes != table.classes:
            odd = sorted(set(classes) ^ set(table.classes))
            what = f"{printable(odd[0])!r} is in one of them alone" if odd else "they come in another order of ids"
            raise UserError(f"{file} and {other} have different categories: {what}; both must have the same")


def split_name(data: ConfigDict, name: str) -> str:
    """Returns the name of a split by its role."""
    return splits.held_out_name(name) if "" in coco_files.layout(_path(data)).files else splits.role(name) or name


def describe(data: ConfigDict, opened: Mapping[str, Any]) -> str:
    """Returns one line about the images, objects and masks that were found."""
    found = coco_files.layout(_path(data))
    each: list[str] = []
    told: set[epath.Path] = set()
    for field, source in opened.items():
        file = found.file(splits.parts(data[field])[0].name)
        table = _table(data, file)
        has = "" if file in told else f" ({file.name} has {pluralize(len(table.label), 'object')})"
        each.append(f"{pluralize(source.size, 'image')} in {data[field]}{has}")
        told.add(file)
    by = "pycocotools" if outlines.routine() else "scikit-image, since pycocotools is not installed (extra coco)"
    masks = f"masks drawn by {by}" if table.outlined else "no outlines: boxes stand in for masks"
    return f"coco {found.root}: {', '.join(each)}; {len(table.classes)} classes; {masks}"


def _path(data: ConfigDict) -> epath.Path:
    if not data.path:
        raise UserError("data.source='coco' needs data.path: the folder of a data set in COCO's format, or its "
                        "annotations, one *.json")
    return locate(data.path, "data.path")


@functools.lru_cache(maxsize=4)
def _files(file: epath.Path, root: epath.Path) -> tuple[epath.Path, list[str], np.ndarray]:
    """Returns the folder of images, their names in it, and whether each exists, bool [n]."""
    names = coco_annotations.read(file).images.names
    if not names:
        raise UserError(f"{file} has no images")
    folder, names = coco_files.image_folder(file, root, names)
    return folder, names, np.array(coco_files.present(folder, names))


def _objects(table: Table) -> np.ndarray:
    """Returns the number of objects of each image, without crowds, int64 [n]."""
    before = np.append(0, np.cumsum(~table.crowd))
    return before[table.first[1:]] - before[table.first[:-1]]


def _told(chosen: np.ndarray, good: np.ndarray, table: Table, text: str) -> np.ndarray:
    """Returns the good images; logs the others."""
    bad = chosen[~good]
    if len(bad):
        more = f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
        named = ", ".join(printable(table.images.names[i]) for i in bad[:MAX_NAMED])
        log.warning("%s: %s%s", text.format(pluralize(len(bad), "image")), named, more)
    return chosen[good]


def _read(table: Table, folder: epath.Path, names: list[str], i: int) -> Example:
    return Example(read_file(folder / names[i]), objects=table.objects(i))


def _truth(table: Table, i: int) -> Truth:
    return Truth(int(table.images.ids[i]), table.objects(i, as_annotated=True))
