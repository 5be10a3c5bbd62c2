"""data.source=tfrecord: TFRecord files of tf.train.Example, given by a pattern in data.path, local or gs://.

'{split}' in the pattern stands for the split's name; without it, 'test' is the last tenth of the records, if the config
uses it. A folder with records.json (as inspect --write makes it) can be given without a pattern. Counts and classes
come from records.json beside the files; without it, records are counted at every start. Files that records.json
declares, or that the names of others imply ('-00003-of-00008'), must exist if they fit the pattern.
"""

import fnmatch
import glob
import logging
import re
import time
from typing import Any

import numpy as np
from etils import epath
from google.protobuf.message import DecodeError
from ml_collections import ConfigDict

from mae_jax.data import record_files, tensorflow_cpu
from mae_jax.data.sources import patterns, splits
from mae_jax.data.sources.base import RecordStream, numbered_classes
from mae_jax.data.tensorflow_cpu import UNREADABLE, reason, tf
from mae_jax.errors import UserError, did_you_mean, pluralize, printable
from mae_jax.runtime import bounded_json
from mae_jax.storage.file_kinds import unreadable

log = logging.getLogger(__name__)

RECORDS = "records.json"  # {"records": {file name: count}, "classes": [names]}
PATTERN = "{split}-*.tfrecord"  # of the files beside records.json
MAX_RECORDS = 2**40  # of a file
BY_SPLIT = re.compile(r"(train|val|validation|test)-.*")  # names of files in a folder without records.json
LISTS = {"bytes_list": "text", "float_list": "fractions", "int64_list": "whole numbers"}  # of tf.train.Feature


def load(data: ConfigDict, split: splits.Split) -> RecordStream:
    """Opens a split; raises UserError if no file fits, or the records lack the features."""
    pattern = _pattern(data.path).replace("{split}", split.name)
    files = _files(pattern, split.name)
    labeled = _check_features(files, data)
    _check_names(files, pattern)
    described = _described(files[0].parent)
    if described:
        counts, classes = _promised(files, pattern, *described)
    else:
        counts, classes = _counted(files, data.label_key if labeled else "")
    total = sum(counts)
    low, high = (0, 1) if "{split}" in _pattern(data.path) else splits.part(split.name, splits.holds_out(data))
    first, last = round(low * total), round(high * total)
    start, stop = split.bounds(last - first)
    return RecordStream(
        files=tuple(map(str, files)), counts=counts, start=first + start, size=stop - start,
        mean_bytes=sum(file.stat().length for file in files) / max(total, 1), image_key=data.image_key,
        label_key=data.label_key if classes else "", classes=classes, promised_by=RECORDS if described else "")


def split_name(data: ConfigDict, name: str) -> str:
    """Returns the name of a split in the files."""
    return name if "{split}" in _pattern(data.path) else splits.held_out_name(name)


def _pattern(path: str) -> str:
    """Returns the pattern of the files, also for a folder.

    Raises:
      UserError: a folder has no records.json, and its file names do not follow the usual pattern of splits.
    """
    if not path or (path.startswith("gs://") and "*" in path) or not epath.Path(path).is_dir():
        return path
    folder = epath.Path(path)
    if (folder / RECORDS).is_file():
        return str(folder / PATTERN)
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith(".") and not file.is_dir())
    splits_there = sorted({name.split("-")[0] for name in names if BY_SPLIT.fullmatch(name)})
    if not splits_there:
        raise UserError(f"data.path={path!r} is a folder without {RECORDS}; name its files by a pattern, such as "
                        f"{str(folder / '{split}-*')!r} or {str(folder / '*')!r}; there are "
                        f"{pluralize(len(names), 'file')}{f', such as {names[0]}' if names else ''}")
    return str(folder / "{split}-*")


def _files(pattern: str, split: str) -> list[epath.Path]:
    """Returns the files of a split, sorted."""
    folder, slash, name = pattern.rpartition("/")
    # An existing folder of exactly this name takes precedence over its name as a pattern.
    literal = glob.escape(folder) + slash + name if tf.io.gfile.isdir(folder) else pattern
    found = tf.io.gfile.glob(literal) if pattern else []
    names = sorted(name for name in found if name.rpartition("/")[2] != RECORDS)
    if not names and pattern and tf.io.gfile.isdir(folder) and name.startswith(f"{split}-"):
        there = sorted({each.split("-")[0] for each in tf.io.gfile.listdir(folder) if BY_SPLIT.fullmatch(each)})
        if there:
            raise UserError(f"data.path={folder!r} has no files of the split {split!r}, only of {', '.join(there)}; "
                            f"use one of them, as --config.data.eval_split={there[-1]}")
    if not names:
        raise UserError(f"no file matches data.path={pattern!r} for the split {split!r}; data.source='tfrecord' needs "
                        "a pattern such as '/data/{split}-*.tfrecord'")
    return [epath.Path(name) for name in names]


def _check_features(files: list[epath.Path], data: ConfigDict) -> bool:
    """Checks the first of all records; returns whether it has an integer data.label_key."""
    file = next((file for file in files if file.stat().length), None)
    if file is None:
        raise UserError(f"{pluralize(len(files), 'file')} of data.path={data.path!r}, such as {files[0]}, are empty")
    compression, readable = record_files.opening(str(file))
    try:
        raw = next(iter(tf.data.TFRecordDataset(str(file), compression).take(readable)), None)
        if raw is None:
            raise UserError(f"{file} is cut short or damaged: {record_files.look(file).problem or 'it has no records'}")
        features = tf.train.Example.FromString(raw.numpy()).features.feature
    except (*UNREADABLE, DecodeError) as error:
        raise UserError(f"{file} is not a TFRecord file of tf.train.Example, or damaged at its first record: "
                        f"{reason(error)}") from error
    image = features.get(data.image_key)
    if image is None or len(image.bytes_list.value) != 1:
        raise UserError(f"the records of {file} have no encoded image data.image_key={data.image_key!r}; "
                        f"{did_you_mean(data.image_key, features)}")
    label = features.get(data.label_key)
    if label is not None and label.WhichOneof("kind") not in (None, "int64_list"):
        log.warning("%s: data.label_key=%r holds %s, and not class numbers: images are read as unlabeled", file,
                    data.label_key, LISTS[label.WhichOneof("kind")])
    return label is not None and bool(label.int64_list.value)


def _described(folder: epath.Path) -> tuple[dict[str, int], tuple[str, ...]] | None:
    """Returns records per file name, and class names, from the folder's records.json; None without one."""
    file = folder / RECORDS
    if not file.is_file():
        return None
    content = file.read_bytes()
    try:
        said = bounded_json.parse_object(content)
        records, classes = said.get("records"), said.get("classes")
        if not isinstance(records, dict) or not isinstance(classes, list):
            raise ValueError("it has no object 'records', or no list 'classes'")
        if not all(isinstance(count, int) and 0 <= count <= MAX_RECORDS for count in records.values()):
            raise ValueError("a count is not a number of records")
        if not all(isinstance(name, str) for name in classes):
            raise ValueError("a class is not a string")
    except ValueError as error:
        raise UserError(f"{unreadable(file, content, error)}; remove it to have the records counted") from None
    return records, tuple(classes)


def _promised(files: list[epath.Path], pattern: str, records: dict[str, int], classes: tuple[str, ...]
              ) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns records per file, and class names, from records.json; raises UserError if declared files are missing."""
    found, folder = {file.name for file in files}, files[0].parent
    if unknown := sorted(found - records.keys()):
        raise UserError(f"{folder / RECORDS} does not name {unknown[0]}; remove it to have the records counted")
    _check_there(sorted(records.keys() - found), folder, pattern, RECORDS)
    return tuple(records[file.name] for file in files), classes


def _check_names(files: list[epath.Path], pattern: str) -> None:
    """Raises UserError if files are missing according to the names of the others."""
    found = {file.name for file in files}
    _check_there(sorted(patterns.promised(found) - found), files[0].parent, pattern, "the names of the others")


def _check_there(missing: list[str], folder: epath.Path, pattern: str, promised_by: str) -> None:
    wanted = [name for name in missing if fnmatch.fnmatch(name, pattern.rsplit("/", 1)[-1])]
    if wanted:
        raise UserError(f"{pluralize(len(wanted), 'file')} missing in {folder} by {promised_by}, such as {wanted[0]}; "
                        "write the data again, or select files by a narrower pattern in data.path")


def _counted(files: list[epath.Path], label_key: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Counts the records per file, and collects the classes (label_key '': none), by reading the files."""
    begin = time.monotonic()
    found, broken = [], []
    for file in files:
        try:
            found.append(_labels(file, label_key) if label_key else count_records(file))
        except UserError as error:
            broken.append(str(error))
    if broken:
        more = f"; and {len(broken) - 1} more of {len(files)} files" if broken[1:] else ""
        raise UserError(broken[0] + more)
    counts = tuple(map(len, found)) if label_key else tuple(found)
    classes = numbered_classes(np.concatenate(found)) if label_key else ()
    log.info("counted %d records in %s in %.1f s; a %s beside them saves this (mae_jax inspect "
             "--write=tfrecord writes one)", sum(counts),
             pluralize(len(files), "file"), time.monotonic() - begin, RECORDS)
    return counts, classes


def count_records(file: epath.Path) -> int:
    """Counts the records of a file by their headers; raises UserError if the file is truncated or damaged."""
    found = record_files.look(file)
    if found.problem:
        raise UserError(f"{file} is cut short or damaged: {found.problem}")
    return found.records


def _labels(file: epath.Path, label_key: str) -> np.ndarray:
    """Returns the labels of all records, int64 [records]; raises UserError if the file is truncated or damaged."""
    count_records(file)
    feature, labels = {label_key: tf.io.FixedLenFeature([], tf.int64, -1)}, [np.zeros(0, np.int64)]
    dataset = tf.data.TFRecordDataset(str(file), record_files.look(file).compression).batch(1024)
    dataset = dataset.map(lambda raw: tf.io.parse_example(raw, feature)[label_key])
    try:
        labels += dataset.with_options(tensorflow_cpu.options()).as_numpy_iterator()
    except UNREADABLE as error:
        wrong = odd_record(str(file), label_key=label_key)
        raise UserError(wrong or f"{file} is cut short or damaged: {reason(error)}") from None
    return np.concatenate(labels)


def odd_record(file: str, image_key: str = "", label_key: str = "") -> str:
    """Returns what is wrong with the first record that is no example of an image and a label; '' if all are.

    Args:
      file: has valid headers.
      image_key: feature of one encoded image; '' is not checked.
      label_key: feature of at most one class number; '' is not checked.
    """
    compression, readable = record_files.opening(file)
    records = tf.data.TFRecordDataset(file, compression).take(readable).with_options(tensorflow_cpu.options())
    number = -1
    try:
        for number, raw in enumerate(records.as_numpy_iterator()):
            features = tf.train.Example.FromString(raw).features.feature
            wrong = _odd(features, image_key, "bytes_list") or _odd(features, label_key, "int64_list")
            if wrong:
                return f"record {number} of {printable(file)} has {wrong}"
    except DecodeError:
        return f"{printable(file)} is damaged: record {number} is no tf.train.Example"
    except UNREADABLE as error:
        return f"{printable(file)} is damaged after record {number}: {reason(error)}"
    return ""


def _odd(features: Any, key: str, wanted: str) -> str:
    """Returns what a record has instead of one value; '' for one or none."""
    kind = features[key].WhichOneof("kind") if key and key in features else None
    values = len(getattr(features[key], kind).value) if kind else 0
    if not values or (kind == wanted and values == 1):
        return ""
    what = f"{values} values" if kind == wanted else LISTS[kind]
    if wanted == "bytes_list":
        return f"{what} in data.image_key={key!r}; expected one encoded image"
    return f"{what} in data.label_key={key!r}; expected one class number (data.label_key='' reads none)"
