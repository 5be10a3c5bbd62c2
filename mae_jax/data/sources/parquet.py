"""data.source=parquet: Parquet files of encoded images, as written by Hugging Face's `datasets` and stored on its hub.

data.path is a folder or a pattern (`patterns`), local or in a bucket. Files are assigned to splits by the hub's names
(train-00000-of-00002.parquet); without splits, a tenth is held out by a hash of the row, if the config uses it. The
image column (data.image_key, or the one that the metadata declare an image) has bytes, or a struct of `bytes` and
`path`; the label column (data.label_key) has numbers or texts, with class names from the metadata.

A Parquet file is read in groups of many rows. For random access, each file is copied once, in Arrow's format, to the
folder of `storage.cache`, and memory-mapped.
"""

import bisect
import logging
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from ml_collections import ConfigDict

from mae_jax.data.decode import decode_mask
from mae_jax.data.sources import patterns, splits, text_labels
from mae_jax.data.sources.base import UNLABELED, Example, Source, class_numbers, numbered_classes
from mae_jax.data.sources.text_labels import USUAL, asked, sliced, told
from mae_jax.errors import UserError, did_you_mean, pluralize, printable
from mae_jax.runtime import bounded_json
from mae_jax.storage import cache, file_kinds
from mae_jax.storage.paths import version

log = logging.getLogger(__name__)

VERSION = 2  # of the copy
ENDING = ".parquet"
BATCH = 64  # rows copied at once


class Columns(NamedTuple):
    """The columns that are read, and their metadata."""

    image: str
    label: str  # '' for none
    mask: str  # '' for none
    classes: tuple[str, ...]  # names by number, () without metadata


class Rows(NamedTuple):
    """The rows of one file, memory-mapped."""

    batches: tuple[pa.RecordBatch, ...]
    ends: tuple[int, ...]  # rows up to the end of each batch
    labels: np.ndarray  # int64 or str [n]


def load(data: ConfigDict, split: splits.Split) -> Source:
    """Opens a split; raises UserError if no file fits, or one lacks the columns or is damaged."""
    files, columns = _files(data, split.name)
    rows = [_rows(file, columns) for file in files]
    every = _source(data, split.name, files, columns, rows)
    return sliced(data, every, split, ENDING)


def split_name(data: ConfigDict, name: str) -> str:
    """Returns the name of a split in the files."""
    return patterns.split_name(data.path, ENDING, name)


def describe(data: ConfigDict, opened: Mapping[str, Source]) -> str:
    """Returns one line about the columns that were read."""
    files, columns = _files(data, splits.parts(data.get("train_split") or "train")[0].name)
    parts, count = told(data, opened), patterns.count(data.path, ENDING, (data[field] for field in opened))
    label = f"labels from {printable(columns.label)!r}" if columns.label else "no labels"
    return (f"{'; '.join(parts)}; from {pluralize(count, 'file')} such as {printable(files[0].name)}, images from "
            f"{printable(columns.image)!r}, {label}")


def _source(data: ConfigDict, split: str, files: list[epath.Path], columns: Columns, rows: list[Rows]) -> Source:
    ends = np.cumsum([len(each.labels) for each in rows]).tolist()
    labels, classes, strange = _labels(data, split, columns, rows)
    versions = [version(file) for file in files]
    return Source(len(labels), partial(_read, versions, columns, ends, labels, data.get("mask_offset", 0)),
                  partial(_name, [file.name for file in files], ends), classes,
                  ("pixel_label",) if columns.mask else (), lambda i: int(labels[i]), unknown_classes=strange)


def _read(versions: list[tuple[str, int, int]], columns: Columns, ends: list[int], labels: np.ndarray, offset: int,
          i: int) -> Example:
    file, row = _place(ends, i)
    batch, row = _batch(_mapped(*versions[file], columns), row)
    image = batch.column("image")[row].as_py()
    if image is None:
        raise OSError("it has no bytes, but null or a path")
    mask = batch.column("mask")[row].as_py() if columns.mask else None
    if columns.mask and mask is None:
        raise OSError(f"no mask {columns.mask!r}")
    return Example(image, int(labels[i]), mask=None if mask is None else decode_mask(mask, offset))


def _name(names: list[str], ends: list[int], i: int) -> str:
    file, row = _place(ends, i)
    return f"{printable(names[file])}, row {row}"


def _place(ends: list[int], i: int) -> tuple[int, int]:
    """Returns the index of the file with an example, and the row there."""
    file = bisect.bisect_right(ends, i)
    return file, i - (ends[file - 1] if file else 0)


def _labels(data: ConfigDict, split: str, columns: Columns, rows: list[Rows]
            ) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Returns labels, int [rows], classes, and names of classes that the training split lacks.

    Names take precedence over numbers: a split whose metadata number the classes differently gets the numbers of the
    training split.

    Raises:
      UserError: a number exceeds the names, or is no class number.
    """
    values = np.concatenate([each.labels for each in rows])
    numbers = np.issubdtype(values.dtype, np.integer)
    if numbers and columns.classes:
        if len(values) and values.max() >= len(columns.classes):
            raise UserError(f"data.path={data.path!r}: the column {columns.label!r} has the number {values.max()}, but "
                            f"the metadata have {len(columns.classes)} classes")
        values = np.array([columns.classes[value] if value >= 0 else "" for value in values], np.str_)
    elif numbers:
        return np.maximum(values, UNLABELED), numbered_classes(values) if columns.label else (), ()
    training = splits.parts(data.get("train_split") or "train")[0].name
    known, texts = columns, values
    if split != training and patterns.by_split(data.path, ENDING):
        files, known = _files(data, training)
        texts = values if known.classes else np.concatenate([_rows(file, known).labels for file in files])
    classes = known.classes or text_labels.classes_of(map(str, texts))
    labels, strange = text_labels.numbers([str(value) for value in values], classes)
    return labels, classes, strange


def _batch(rows: Rows, row: int) -> tuple[pa.RecordBatch, int]:
    number = bisect.bisect_right(rows.ends, row)
    return rows.batches[number], row - (rows.ends[number - 1] if number else 0)


def _files(data: ConfigDict, split: str) -> tuple[list[epath.Path], Columns]:
    if not data.path:
        raise UserError("data.source='parquet' needs data.path: a folder of *.parquet, or a pattern of them")
    files = patterns.files(data.path, ENDING, split)
    keys = tuple(asked(data, key) for key in USUAL)
    unlabeled = data.get("label_key", "") == ""
    found = {_columns(*version(file), *keys, data.get("mask_key", ""), unlabeled): file for file in files}
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise UserError(f"{first} and {second} have different columns or names of classes: {one} and {other}")
    return files, next(iter(found))


@lru_cache(maxsize=100_000)
def _columns(name: str, size: int, changed: int, image: str, label: str, mask: str, unlabeled: bool) -> Columns:
    """Finds the columns of a file; '' stands for a column that is not configured."""
    file = epath.Path(name)
    schema = _opened(file, lambda opened: opened.schema_arrow)
    if len(set(schema.names)) < len(schema.names):
        raise UserError(f"{file} has two columns with one name: {', '.join(map(printable, schema.names))}")
    features = _features(schema)
    images = [key for key, feature in features.items() if feature.get("_type") == "Image" and key != mask]
    images += [field.name for field in schema if _bytes_of(field.type) and field.name not in (*images, mask)]
    usable = [key for key in ((image and [image]) or [USUAL["image_key"], *images])
              if key in schema.names and _bytes_of(schema.field(key).type)]
    if not usable:
        name = image or USUAL["image_key"]
        raise UserError(f"{file} has no column of encoded images data.image_key={name!r}; "
                        f"{did_you_mean(name, schema.names)}")
    if mask and (mask not in schema.names or not _bytes_of(schema.field(mask).type)):
        raise UserError(f"{file} has no column of masks data.mask_key={mask!r}; {did_you_mean(mask, schema.names)}")
    named = [key for key, feature in features.items() if feature.get("_type") == "ClassLabel"]
    usual = named[0] if len(named) == 1 and USUAL["label_key"] not in schema.names else USUAL["label_key"]
    labels = "" if unlabeled else label or usual
    if labels not in schema.names:
        if label:
            raise UserError(f"{file} has no column data.label_key={label!r}; {did_you_mean(label, schema.names)}")
        labels = ""
    kind = _plain(schema.field(labels).type) if labels else pa.int64()
    if not (_numeric(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        if label:
            raise UserError(f"{file}: data.label_key={label!r} is a column of {kind}; expected class numbers, or text")
        log.warning("%s: the column %r is of %s, and is not used as class numbers", file, labels, kind)
        labels = ""
    names = features.get(labels, {}).get("names") if labels else None
    classes = tuple(map(str, names)) if isinstance(names, list) else ()
    return Columns(usable[0], labels, mask, classes)


def _plain(kind: pa.DataType) -> pa.DataType:
    """Returns the value type of a dictionary, and any other type unchanged."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _numeric(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Returns the column features from the metadata of `datasets`, {} without these."""
    try:
        said = bounded_json.parse_object((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = said.get("info", {}).get("features", {})
        return {key: value for key, value in features.items() if isinstance(value, dict)}
    except (ValueError, AttributeError):
        return {}


def _bytes_of(kind: pa.DataType) -> bool:
    """Returns whether a column may hold encoded images: bytes, or a struct with bytes in the field `bytes`."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _bytes_of(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _opened(file: epath.Path, what: Any) -> Any:
    """Returns the result of a function of the opened file; raises UserError for a damaged file."""
    try:
        with file.open("rb") as opened:
            return what(pq.ParquetFile(opened))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # pyarrow reports some damage as an OSError without errno
            raise
        with file.open("rb") as opened:
            begin = opened.read(file_kinds.ENOUGH)
        found = "" if begin.startswith(b"PAR1") else file_kinds.kind(begin)
        text = f"it is {found}" if found else str(error).splitlines()[0]
        raise UserError(f"{file} is not a Parquet file, or damaged: {text}") from None


@lru_cache(maxsize=100_000)
def _mapped(name: str, size: int, changed: int, columns: Columns) -> Rows:
    """Memory-maps the copy of a file, which is made if it does not exist."""
    file = epath.Path(name)
    key = ("parquet", VERSION, name, size, changed, columns[:3])
    try:
        batches = _opened_copy(key, size, file, columns)
    except pa.ArrowException:  # the copy was truncated: make it again
        cache.forget(key, ".arrow")
        batches = _opened_copy(key, size, file, columns)
    labels = [batch.column("label").to_numpy(zero_copy_only=False) for batch in batches]
    ends = tuple(np.cumsum([batch.num_rows for batch in batches]).tolist())
    return Rows(batches, ends, np.concatenate(labels) if labels else np.zeros(0, np.int64))


def _opened_copy(key: Any, size: int, file: epath.Path, columns: Columns) -> tuple[pa.RecordBatch, ...]:
    copy = cache.file(key, ".arrow", int(1.1 * size), partial(_copy, file, columns))
    reader = pa.ipc.open_file(pa.memory_map(str(copy)))
    return tuple(reader.get_batch(number) for number in range(reader.num_record_batches))


def _rows(file: epath.Path, columns: Columns) -> Rows:
    return _mapped(*version(file), columns)


def _copy(file: epath.Path, columns: Columns, to: Path) -> None:
    """Copies the columns of a file to Arrow's format, a few rows at a time."""
    log.info("%s is copied once to %s, for random access", file, to.parent)
    wanted = [name for name in (columns.image, columns.label, columns.mask) if name]

    def write(opened: pq.ParquetFile) -> None:
        kind = _plain(opened.schema_arrow.field(columns.label).type) if columns.label else pa.int64()
        label = pa.int64() if _numeric(kind) else pa.string()
        fields = [("image", pa.large_binary()), ("label", label)]
        schema = pa.schema(fields + [("mask", pa.large_binary())] * bool(columns.mask))
        with pa.OSFile(str(to), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in opened.iter_batches(BATCH, columns=list(dict.fromkeys(wanted))):
                arrays = [_bytes(batch.column(columns.image)), _label(file, batch, columns.label, label)]
                arrays += [_bytes(batch.column(columns.mask))] if columns.mask else []
                writer.write_batch(pa.record_batch(arrays, schema=schema))

    _opened(file, write)


def _bytes(column: pa.Array) -> pa.Array:
    if pa.types.is_struct(column.type):
        column = column.flatten()[column.type.get_field_index("bytes")]
    return column.cast(pa.large_binary())


def _label(file: epath.Path, batch: pa.RecordBatch, name: str, kind: pa.DataType) -> pa.Array:
    """Returns labels with -1 or '' for nulls; raises UserError for numbers that are no class numbers."""
    if not name:
        return pa.array(np.full(batch.num_rows, UNLABELED))
    column = batch.column(name)
    column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if kind == pa.string():
        return column.cast(kind).fill_null("")
    values, numbers = column.drop_null().to_numpy(zero_copy_only=False), np.full(len(column), UNLABELED, np.int64)
    try:
        numbers[np.asarray(column.is_valid())] = class_numbers(values, f"{file}: the labels of the column {name!r}")
    except UserError as error:
        if name != USUAL["label_key"] or values.dtype.kind != "f":  # the column is configured, or has integers
            raise
        log.warning("%s: they are not used as class numbers", error)
    return pa.array(numbers)
