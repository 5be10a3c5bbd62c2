"""data.source=folder: the images under a folder, at any depth, local or gs://.

`folder_layout` recognizes the layout: splits and classes by sub-folders, or neither. Without splits, the hash of an
image's relative path decides its split, so that adding files moves no image: 'test' is a tenth, if the config uses it,
and 'train' the rest. A held-out split without class folders may have a label list (`label_lists`). The masks of
data.mask_key lie in a folder of the same structure, as PNG files of the same names. Symbolic links are followed for
reading. File names are compared in Unicode's form NFC.
"""

import functools
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.data.decode import BadImage, decode_mask, read_file
from mae_jax.data.sources import folder_layout, folder_listing, label_lists, splits
from mae_jax.data.sources.base import UNLABELED, Example, Source, printable_name
from mae_jax.data.sources.expected_sizes import check_size
from mae_jax.data.sources.folder_layout import Layout, Part
from mae_jax.data.sources.names import Names
from mae_jax.errors import UserError, pluralize, printable
from mae_jax.storage.paths import locate

log = logging.getLogger(__name__)

# Extensions of images that are not read, which a run reports.
UNREAD = (".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jfif", ".ppm", ".pgm", ".dng", ".nef", ".cr2", ".arw",
          ".svg", ".psd", ".dcm", ".exr", ".npy", "")

OF_FILES = {".tar": "tar", ".parquet": "parquet", ".csv": "table", ".tsv": "table", ".txt": "table", ".npz": "npz",
            ".tfrecord": "tfrecord"}  # extension → the source that reads such files
MAX_LISTED_EXTENSIONS = 5  # extensions of other files that are listed with counts
MAX_LISTED_CLASSES = 10  # classes or names listed in the line about a layout
FIELDS = ("train_split", "val_split", "eval_split")


class Opened(NamedTuple):
    """A folder, and its layout."""

    root: epath.Path  # data.path
    layout: Layout
    train: Part


def load(data: ConfigDict, split: splits.Split) -> Source:
    """Opens a split; raises UserError if the folder is missing, has no images, or has no such split."""
    opened = _open(data)
    part = _part(data, opened, split.name)
    whole = opened.layout.kind in ("splits", "nested")
    start, stop = split.shares(*((0, 1) if whole else splits.part(split.name, splits.holds_out(data))))
    names = part.listing.pictures
    chosen = np.arange(len(names)) if (start, stop) == (0, 1) else splits.within(names, start, stop)
    labels, strange = _labels(data, opened, part, split)
    if str(split) == split.name:
        check_size(data.get("name", ""), split.name, len(chosen))
    listing = part.listing.only(chosen)
    files = listing.paths
    return _source(part, files, listing.pictures, labels[chosen], strange,
                   _masks(data, opened.root, part.base, files), data.mask_offset)


def split_name(data: ConfigDict, name: str) -> str:
    """Returns the name of a split in the folder."""
    layout = _layout(data)
    if layout.kind in ("splits", "nested"):
        return folder_layout.folder_of(layout, name, _field(data, name))
    return splits.held_out_name(name)


def describe(data: ConfigDict, opened: Mapping[str, Source]) -> str:
    """Returns one line about the layout of the folder.

    Args:
      data: the config group `data`.
      opened: 'train_split' ... → its source, for the splits in the config.
    """
    texts = []
    for field, source in opened.items():
        what, where = _what(data, field)
        classes = ""
        if field == "train_split":
            count, shown = len(source.classes), ", ".join(map(printable, source.classes[:MAX_LISTED_CLASSES]))
            more = f" and {count - MAX_LISTED_CLASSES} more" if count > MAX_LISTED_CLASSES else ""
            classes = f" in {count} classes ({shown}{more})" if count else " without classes"
        elif source.classes and source.label:
            lost = sum(source.label(i) < 0 for i in range(source.size))
            classes = f" ({lost} without a label)" if 0 < lost < source.size else " without labels" if lost else ""
        images = str(source.size) if texts and not classes else pluralize(source.size, "image")
        texts.append(f"{what}: {images}{classes} from {where}")
    return "; ".join(texts + _left_out(data))


def _what(data: ConfigDict, field: str) -> tuple[str, str]:
    """Returns the name of a split for the line, and the place it is read from."""
    opened, expression, wheres, roles = _open(data), data[field], [], set()
    for split in splits.parts(expression):
        if opened.layout.kind in ("splits", "nested"):
            folder = folder_layout.folder_of(opened.layout, split.name, f"data.{field}")
            roles.add(splits.role(folder))
            part = _part(data, opened, split.name)
            base = _inside(opened.root, part.base)
            where = f"{base}/" if opened.layout.kind == "splits" else f"the folders {folder}/ of the classes"
            if listed := _list_of(opened, part, folder):
                where += f", by {listed.file.name}"
        else:
            roles.add(splits.role(split.name))
            inside = _inside(opened.root, opened.train.base)
            kind = "the class folders" if opened.train.classes else "the folder"
            where = kind if inside == "." else f"{inside}/"
            if splits.role(split.name) != "train":
                where += ", held out by a hash of the names"
        wheres.append(where + (f" [{split.start}:{split.stop}]" if str(split) != split.name else ""))
    own = {"train_split": "train", "val_split": "validation", "eval_split": "test"}[field]
    names = {"val": "validation", "test": "test"}
    return (names.get(roles.pop(), own) if len(roles) == 1 and field != "train_split" else own), " + ".join(wheres)


def _left_out(data: ConfigDict) -> list[str]:
    """Returns texts about the content that no split of the config reads, for the line about the layout."""
    opened, texts = _open(data), []
    parts = {_part(data, opened, split.name) for field in FIELDS if data[field] for split in splits.parts(data[field])}
    strays = sorted({_inside(opened.root, part.base / name) for part in parts for name in part.strays})
    if strays:
        texts.append(f"left out, beside the class folders: {pluralize(len(strays), 'image')}, such as "
                     f"{printable(strays[0])}")
    others = [printable(name) for top in _tops(opened) for name in _beside(opened, top)]
    if opened.layout.kind == "splits":
        used = {split_name(data, split.name) for field in FIELDS if data[field] for split in splits.parts(data[field])}
        folders = folder_listing.folders(opened.layout.root, opened.layout.plain)
        others = [f"{printable(name)}/" for name in folders if name not in used] + others
    if others:
        more = f" and {len(others) - MAX_LISTED_CLASSES} more" if len(others) > MAX_LISTED_CLASSES else ""
        texts.append(f"not read: {', '.join(others[:MAX_LISTED_CLASSES])}{more}")
    ignored: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    for part in {part.base: part for part in parts}.values():
        ignored.update(dict(part.listing.ignored))
        unread.update(kind for name in part.listing.others if (kind := os.path.splitext(name)[1].lower()) in UNREAD)
    if unread:
        texts.append(f"not read, by the extension: {folder_listing.some(unread.items())}")
    if ignored:
        texts.append(f"ignored, of file servers and viewers: {folder_listing.some(ignored.items())}")
    return texts


def _open(data: ConfigDict) -> Opened:
    layout = _layout(data)
    return Opened(_root(data.path), layout, folder_layout.training(layout, data.get("train_split") or "train"))


def _layout(data: ConfigDict) -> Layout:
    return folder_layout.recognize(_root(data.path), data.get("layout") or "auto", data.get("formats") or "auto")


def _part(data: ConfigDict, opened: Opened, name: str) -> Part:
    return folder_layout.part(opened.layout, name, _field(data, name), opened.train)


def _field(data: ConfigDict, name: str) -> str:
    """Returns the config field that holds the name of a split."""
    for field in reversed(FIELDS):
        if any(split.name == name for split in splits.parts(data.get(field) or "train")):
            return f"data.{field}"
    return "data.eval_split"


def _root(path: str) -> epath.Path:
    root = locate(path, "data.path") if path else None
    if root is None or not root.is_dir():
        ending = os.path.splitext(path)[1].lower()
        other = f"; --config.data.source={OF_FILES[ending]} reads such files" if ending in OF_FILES else ""
        raise UserError(f"data.path={path!r} is not a folder; data.source='folder' needs a folder of images{other}")
    return root


def _masks(data: ConfigDict, root: epath.Path, base: epath.Path, files: Names) -> epath.Path | None:
    """Returns the folder of a split's masks, checked for the mask of the first image; None without masks."""
    if not data.mask_key:
        return None
    masks = locate(data.mask_key, "data.mask_key") / os.path.relpath(base, root)
    if files and not (masks / files[0]).with_suffix(".png").is_file():
        raise UserError(f"data.mask_key={data.mask_key!r} has no mask for {files[0]}: "
                        f"{(masks / files[0]).with_suffix('.png')} does not exist")
    return masks


def _labels(data: ConfigDict, opened: Opened, part: Part, split: splits.Split) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the labels of a part, int32 [images], and the names of its classes that the training images lack."""
    names, classes = part.listing.pictures, part.classes
    if listed := _list_of(opened, part, split_name(data, split.name)):
        return listed.labels, listed.unknown
    index = {name: label for label, name in enumerate(classes)}
    firsts = [sys.intern(name.split("/")[0]) if "/" in name else "" for name in names]
    labels = np.array([index.get(first, UNLABELED) for first in firsts], np.int32)
    strange = [names[i] for i in np.flatnonzero(labels < 0)] if classes else []
    if strange:  # no error: if labels are not used, folders may have any meaning
        log.warning("%d of %d images of %r are in class folders that the training images do not have, such as %s: they "
                    "count as unlabeled", len(strange), len(names), str(split), part.base / printable(strange[0]))
    known = not classes or opened.layout.plain  # 0.1.0 continued silently
    return labels, () if known else tuple(sorted(set(firsts) - index.keys() - {""}))


def _list_of(opened: Opened, part: Part, split: str) -> label_lists.LabelList | None:
    """Returns the label list of a held-out part without class folders, or None."""
    names = part.listing.pictures
    if part is opened.train or opened.layout.kind != "splits" or opened.layout.plain or not part.classes or (
            part.listing.folders.keys() & set(part.classes)):
        return None
    places = [part.base]
    while places[-1] not in (opened.root, places[-1].parent):
        places.append(places[-1].parent)
    return label_lists.find(places, split, names, part.classes)


def _source(part: Part, files: Names, names: Names, labels: np.ndarray, strange: tuple[str, ...],
            masks: epath.Path | None, offset: int) -> Source:
    read = functools.partial(_read, part.base, files, labels, masks, offset)
    return Source(len(files), read, functools.partial(printable_name, names), part.classes,
                  ("pixel_label",) if masks else (), lambda i: int(labels[i]), unknown_classes=strange)


def _read(base: epath.Path, files: tuple[str, ...], labels: np.ndarray, masks: epath.Path | None, offset: int,
          i: int) -> Example:
    mask = _read_mask((masks / files[i]).with_suffix(".png"), offset) if masks else None
    return Example(read_file(base / files[i]), int(labels[i]), mask=mask)


def _read_mask(file: epath.Path, offset: int) -> np.ndarray:
    try:
        return decode_mask(read_file(file), offset)
    except FileNotFoundError:
        raise BadImage(f"its mask does not exist: {file}") from None


def unread(data: ConfigDict, expressions: Iterable[str]) -> list[str]:
    """Returns lines about files in the folder that are in none of these splits, by sub-folder or by extension."""
    opened, lines = _open(data), list[str]()
    root, layout = opened.root, opened.layout
    names = {split.name for text in expressions for split in splits.parts(text)}
    in_splits = layout.kind == "splits"
    places = {layout.root / folder_layout.folder_of(layout, name) for name in names} if in_splits else {layout.root}
    others = [_inside(root, place / name) for place in sorted(places)
              for name in folder_listing.files(place, layout.plain, layout.formats).others]
    lost: list[str] = []
    for top in _tops(opened):
        beside = [top / name for name in folder_listing.folders(top, layout.plain)]
        lost += [_inside(root, folder / name) for folder in beside
                 if not any(place.is_relative_to(folder) for place in places)
                 for name in folder_listing.files(folder, layout.plain, layout.formats).pictures]
        lost += _beside(opened, top)
    if lost:
        lines.append(f"{pluralize(len(lost), 'image')} in no split of the config, such as {printable(lost[0])}")
    if others:
        kinds = Counter(printable(os.path.splitext(name)[1].lower()) or "none" for name in others)
        counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(MAX_LISTED_EXTENSIONS))
        lines.append(f"{pluralize(len(others), 'file')} not read, because the extension is not that of an image "
                     f"({counts}), such as {printable(others[0])}")
    return lines


def _tops(opened: Opened) -> list[epath.Path]:
    """Returns the folders of which only one sub-folder, or only those of splits, is read."""
    layout = opened.layout
    tops = [top for top in (layout.root, *layout.root.parents) if top.is_relative_to(opened.root)]
    return tops if layout.kind == "splits" else tops[1:]


def _beside(opened: Opened, folder: epath.Path) -> list[str]:
    """Returns the images directly in a folder, relative to the root."""
    endings = folder_listing.extensions(opened.layout.formats)
    return sorted(_inside(opened.root, file) for file in folder.iterdir()
                  if not file.name.startswith(".") and file.name.lower().endswith(endings))


def _inside(root: epath.Path, path: epath.Path) -> str:
    return os.path.relpath(path, root)
