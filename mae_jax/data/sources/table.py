"""data.source=table: a list of images, one per line: CSV, TSV, or a path and a label separated by a blank, as in Caffe.

Columns are found by name: the image's path (data.image_key, or one of PATHS), relative to the list's folder; its label
(data.label_key, or one of LABELS), a class name or number; its split (one of SPLITS, if it has names of splits); a
mask's path (data.mask_key). Blank lines, and comments that begin with #, are ignored. Without a header, the first
column is the path and the second the label. Without a column of splits, a tenth is held out by a hash of the path, if
the config uses it. Every listed image must exist: all are checked once, then a thousand at each start.
"""

import csv
import functools
import logging
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.data.decode import decode_mask, read_file
from mae_jax.data.identity import short_hash
from mae_jax.data.sources import splits, text_labels
from mae_jax.data.sources.base import READERS, Example, Source, printable_name
from mae_jax.errors import UserError, did_you_mean, pluralize, printable
from mae_jax.storage import cache as cache_of_files
from mae_jax.storage.paths import locate, read_bytes, version

log = logging.getLogger(__name__)

PATHS = ("image", "path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "img_path", "img",
         "image_id")
IMAGE = re.compile(r"#\S+\.\w{2,5}(\s|[,;]|$)")  # a path that begins like a comment
SAMPLED = 1000  # files of a longer list that are checked at a start after all were found once
LABELS = ("label", "class", "target", "category", "label_name", "class_name", "classname", "labels", "species")
FIELDS = ("train_split", "val_split", "eval_split")
SPLITS = ("split", "set", "subset", "partition")
KEYS = ("image_key", "label_key", "mask_key")  # fields of the group `data` that name columns


class Table(NamedTuple):
    """The columns of a list that are read; each is a tuple of texts, () if it is absent."""

    names: dict[str, str]  # 'path', 'label', 'split', 'mask' → name of the column
    paths: tuple[str, ...]
    labels: tuple[str, ...]
    splits: tuple[str, ...]
    masks: tuple[str, ...]


def load(data: ConfigDict, split: splits.Split) -> Source:
    """Opens a split; raises UserError if the list is unreadable, has no such split, or names missing files."""
    file, table = _open(data)
    train = _rows(data, table, "train") if not table.splits else _rows(data, table, _training(data, table))
    rows = _rows(data, table, split.name, (split.start, split.stop))
    _check_once(file, table)
    texts = table.labels or ("",) * len(table.paths)
    classes = text_labels.classes_of(texts[i] for i in (range(len(texts)) if not table.splits else train))
    labels, strange = text_labels.numbers([texts[i] for i in rows], classes)
    paths = [table.paths[i] for i in rows]
    _check_there(file, paths)
    masks = [table.masks[i] for i in rows] if table.masks else []

    read = functools.partial(_read, file, paths, labels, masks, data.get("mask_offset", 0))
    return Source(len(paths), read, functools.partial(printable_name, paths), classes,
                  ("pixel_label",) if masks else (), lambda i: int(labels[i]), unknown_classes=strange)


def _read(file: epath.Path, paths: list[str], labels: np.ndarray, masks: list[str], offset: int, i: int) -> Example:
    mask = decode_mask(read_file(_place(file, masks[i])), offset) if masks else None
    return Example(read_file(_place(file, paths[i])), int(labels[i]), mask=mask)


def split_name(data: ConfigDict, name: str) -> str:
    """Returns the name of a split in the list."""
    table = _open(data)[1]
    return _named(data, table, name) if table.splits else splits.held_out_name(name)


def describe(data: ConfigDict, opened: Mapping[str, Source]) -> str:
    """Returns one line about the columns that were read, and the splits."""
    file, table = _open(data)
    columns = ", ".join(f"{what} {printable(name)!r}" for what, name in table.names.items())
    parts = text_labels.told(data, opened)
    used = {_named(data, table, split.name) for field in opened for split in splits.parts(data[field])
            } if table.splits else set(table.splits)
    if lost := sum(value not in used for value in table.splits):
        others = sorted(set(table.splits) - used)
        named = ", ".join(printable(each) or "no split" for each in others)
        parts.append(f"not read: {pluralize(lost, 'line')} of {named}")
    return f"{'; '.join(parts)}; from {file.name} by the columns {columns}" if table.names.get("path") else \
        f"{'; '.join(parts)}; from {file.name}, whose lines are a path{' and a label' if table.labels else ''}"


def _open(data: ConfigDict) -> tuple[epath.Path, Table]:
    file = locate(data.path, "data.path") if data.path else None
    if file is None or not file.is_file():
        raise UserError(f"data.path={data.path!r} is not a file; data.source='table' needs a list of images: CSV, TSV "
                        "...")
    keys = tuple(text_labels.asked(data, key) for key in KEYS)
    table = _table(*version(file), keys, data.get("label_key", "") == "")
    named = {split.name for field in FIELDS for split in splits.parts(data.get(field) or "train")}
    if table.splits and not any(splits.role(value) or value in named for value in set(table.splits)):
        _tell_no_splits(str(file), table.names["split"], sorted(set(table.splits))[0])
        names = {what: name for what, name in table.names.items() if what != "split"}
        table = table._replace(names=names, splits=())
    return file, table


@cache
def _tell_no_splits(file: str, column: str, value: str) -> None:
    log.warning("%s: the column %r has no names of splits, but %s, and is not read", file, column, printable(value))


@lru_cache(maxsize=8)
def _table(name: str, size: int, changed: int, keys: tuple[str, ...], unlabeled: bool) -> Table:
    """Reads a list, cached while it is unchanged; `keys` are the configured columns of path, label and mask."""
    file = epath.Path(name)
    rows, numbers = _parsed(file)
    head = [field.casefold() for field in rows[0]]
    image, label, mask = keys
    if not {*PATHS, image.casefold()} & set(head):
        if any(keys):
            key, value = next((key, value) for key, value in zip(KEYS, keys, strict=True) if value)
            raise UserError(f"{file}: the first line has no column data.{key}={value!r}; "
                            f"{did_you_mean(value, rows[0])}")
        return _nameless(file, rows, numbers)
    wanted = {"path": (image, PATHS, "image_key"), "label": (label, LABELS, "label_key"), "split": ("", SPLITS, ""),
              "mask": (mask, (), "mask_key")}
    places, names = {}, {}
    for what, (asked, usual, field) in wanted.items():
        if asked and asked.casefold() not in head:
            raise UserError(f"{file} has no column data.{field}={asked!r}; {did_you_mean(asked, rows[0])}")
        found = asked.casefold() if asked else next((name for name in usual if name in head), "")
        if found and head.count(found) > 1:
            raise UserError(f"{file} has two columns {found!r}; name another one as data.{field or 'image_key'}, or "
                            "rename one")
        if found and not (what == "label" and unlabeled):
            places[what], names[what] = head.index(found), rows[0][head.index(found)]
    columns = {what: tuple(_field(file, number, row, place)
                           for number, row in zip(numbers[1:], rows[1:], strict=True))
               for what, place in places.items()}
    return Table(names, *(columns.get(what, ()) for what in wanted))


def _parsed(file: epath.Path) -> tuple[list[list[str]], list[int]]:
    """Returns the lines that are neither empty nor comments, split into fields, and their numbers."""
    try:
        text = (read_bytes(file) or b"").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: byte {error.start}") from None
    lines = [_uncommented(line) for line in text.splitlines()]
    first = next((line for line in lines if line.strip()), "")
    separator = next((each for each in ("\t", ",", ";") if each in first), "")
    try:
        if separator:
            reader = csv.reader(lines, delimiter=separator, strict=True)
            found = [(reader.line_num, [field.strip() for field in row]) for row in reader]
        else:
            found = [(number, re.split(r"\s+(?=\S+$)", line.strip(), maxsplit=1))
                     for number, line in enumerate(lines, 1)]
    except csv.Error as error:
        raise UserError(f"{file} cannot be read as a list: {error}") from None
    found = [(number, row) for number, row in found if any(row)]
    if not found:
        raise UserError(f"{file} is empty")
    return [row for _, row in found], [number for number, _ in found]


def _uncommented(line: str) -> str:
    """Returns a line, '' for a comment; a header, or an image's name, may also begin with #."""
    if not line.startswith("#") or IMAGE.match(line):
        return line
    bare = line.lstrip("# ")
    words = [word.strip().casefold() for word in re.split(r"[,;\t]", bare)]
    return bare if len(words) > 1 and set(PATHS) & set(words) else ""


def _nameless(file: epath.Path, rows: list[list[str]], numbers: list[int]) -> Table:
    """Returns the columns of a list without a header: a path, and optionally a label."""
    width = max(map(len, rows))
    if width > 2 or not re.search(r"\.\w{2,5}$", rows[0][0]):
        raise UserError(f"{file}: the first line has no usual name of a column of paths, and it is not a list of paths "
                        f"and labels; name the column as data.image_key: {', '.join(map(printable, rows[0][:8]))}")
    paths = tuple(row[0] for row in rows)
    labels = tuple(_field(file, number, row, 1) for number, row in zip(numbers, rows, strict=True)
                   ) if width == 2 else ()
    return Table({}, paths, labels, (), ())


def _field(file: epath.Path, number: int, row: list[str], place: int) -> str:
    if place >= len(row):
        raise UserError(f"{file}: line {number} has {pluralize(len(row), 'field')}; expected {place + 1} or more")
    return row[place]


def _rows(data: ConfigDict, table: Table, name: str, bounds: tuple[str, str] = ("", "")) -> list[int]:
    """Returns the indices of the lines of a split."""
    split = splits.Split(name, *bounds)
    if table.splits:
        called = _named(data, table, name)
        rows, (start, stop) = [i for i, value in enumerate(table.splits) if value == called], split.shares(0, 1)
    else:
        rows, (start, stop) = list(range(len(table.paths))), split.shares(*splits.part(name, splits.holds_out(data)))
    if (start, stop) == (0, 1):
        return rows
    paths = [os.path.normpath(table.paths[i]) for i in rows]
    return [rows[i] for i in splits.within(paths, start, stop)]


def _check_once(file: epath.Path, table: Table) -> None:
    """Raises UserError if an image has two labels, or is in two splits, under any spelling of its path."""
    seen: dict[str, tuple[str, str]] = {}
    for i, path in enumerate(table.paths):
        said = (table.labels[i] if table.labels else "", table.splits[i] if table.splits else "")
        before = seen.setdefault(os.path.normpath(path) if "://" not in path else path, said)
        if before != said:
            what = "labels" if before[0] != said[0] else "splits"
            raise UserError(f"{file} names {printable(path)} twice, with two {what}: {before} and {said}")


def _named(data: ConfigDict, table: Table, name: str) -> str:
    """Returns the name of a split in the column of splits: the same name, or another one of the same role."""
    known = sorted(set(table.splits) - {""})
    alike = [each for each in known if splits.role(each) == splits.role(name) != ""]
    if name in known or len(alike) == 1:
        return name if name in known else alike[0]
    held_out = [each for each in known if splits.role(each) in ("val", "test")]
    if not alike and splits.role(name) in ("val", "test") and len(held_out) == 1:
        return held_out[0]
    raise UserError(f"{data.path}: the column {table.names['split']!r} has no split {name!r}, or several with "
                    f"similar names; it has {', '.join(map(printable, known[:8]))}")


def _training(data: ConfigDict, table: Table) -> str:
    return splits.parts(data.get("train_split") or "train")[0].name


def _place(file: epath.Path, path: str) -> epath.Path:
    """Returns the path of an image; raises UserError for an address that is neither local nor in a bucket."""
    if "://" in path and not path.startswith(("gs://", "s3://")):
        raise UserError(f"{file} names {printable(path)}; an image is a file, or in a bucket gs:// or s3://")
    return epath.Path(path) if "://" in path else file.parent / path


def _check_there(file: epath.Path, paths: list[str]) -> None:
    """Raises UserError if listed local files are missing; missing files of a bucket show when they are read."""
    key = ("there", *version(file), short_hash(path.encode() for path in paths))
    if len(paths) > SAMPLED and cache_of_files.found(key) is not None:
        some = [paths[i] for i in np.linspace(0, len(paths) - 1, SAMPLED).astype(int)]
        if _are_there(file, some)[1].all():
            return
    local, there = _are_there(file, paths)
    if len(paths) > SAMPLED and there.all():
        cache_of_files.keep(key, {"there": np.array(len(paths))})
    if len(there) and not there.all():
        first = paths[local[int(np.argmin(there))]]
        raise UserError(f"{file} names {pluralize(int((~there).sum()), 'file')} of {len(paths)} that do not exist, "
                        f"such as {printable(first)}; paths are relative to {file.parent}")


def _are_there(file: epath.Path, paths: list[str]) -> tuple[list[int], np.ndarray]:
    """Returns the indices of the local paths, and whether each of these exists, bool."""
    places = [_place(file, path) for path in paths]
    local = [i for i, place in enumerate(places) if "://" not in str(place)]
    with ThreadPoolExecutor(READERS) as pool:
        return local, np.array(list(pool.map(lambda i: os.path.isfile(places[i]), local)), bool)
