"""The table of sources, by name."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax import plugins
from mae_jax.data.sources import mixture, splits
from mae_jax.data.sources.base import RecordStream, Source
from mae_jax.errors import UserError
from mae_jax.storage.paths import check_bucket, normalized

BUILT_IN = ("digit_scenes", "letters", "mnist5k", "photo_crops", "photo_mosaic")  # sources within Python packages
NOT_ON_S3 = ("clipart", "coco", "fashion_scenes", "tfds", "tfrecord")  # TensorFlow reads the last two
# data.source → the module with `load(data, split)`. Imported on demand: some need further packages.
# A plug-in provides such a module too, or the function.
MODULES = {
    "clipart": "mae_jax.data.sources.clipart",
    "coco": "mae_jax.data.sources.coco",
    "digit_scenes": "mae_jax.data.sources.digit_scenes",
    "fashion_scenes": "mae_jax.data.sources.fashion_scenes",
    "folder": "mae_jax.data.sources.folder",
    "letters": "mae_jax.data.sources.letters",
    "mnist5k": "mae_jax.data.sources.mnist5k",
    "npz": "mae_jax.data.sources.npz",
    "photo_crops": "mae_jax.data.sources.photo_crops",
    "photo_mosaic": "mae_jax.data.sources.photo_mosaic",
    "parquet": "mae_jax.data.sources.parquet",
    "table": "mae_jax.data.sources.table",
    "tar": "mae_jax.data.sources.tar",
    "tfds": "mae_jax.data.sources.tfds",
    "tfrecord": "mae_jax.data.sources.tfrecord",
}


def load(data: ConfigDict, expression: str) -> Source | RecordStream:
    """Opens one split of the config's source, or a sum of several ('train+validation').

    Raises:
      UserError: the source or split is unknown, missing or empty, or its splits cannot be joined.
    """
    if data.get("mix"):
        return mixture.mixed(data, [load(part, expression) for part in mixture.parts(data)])
    found = _found(data)
    if data.get("path") and data.source in BUILT_IN:
        raise UserError(f"data.source={data.source!r} does not read data.path={data.path!r}; leave it out, or name a "
                        "source that reads it, such as --config=folder")
    data = _located(data)
    path = data.get("path") or ""
    if path.startswith("s3://") and data.source in NOT_ON_S3:
        raise UserError(f"data.path={path!r}: data.source={data.source!r} does not read s3://; folder, table, tar, "
                        "parquet and npz do")
    check_bucket(path)
    opened = getattr(found, "load", found)
    parts = [opened(data, split) for split in splits.parts(expression)]
    for part in parts:
        if not isinstance(part, Source | RecordStream):
            raise UserError(f"data.source={data.source!r} opened {expression!r} as {type(part).__name__}; expected a "
                            "Source or a RecordStream of mae_jax.data.sources.base")
    source = functools.reduce(lambda one, other: one.joined(other), parts)
    if not source.size:
        raise UserError(_nothing(data, expression))
    if not data.get("classes"):
        return source
    from mae_jax.data.sources.class_filter import keep_classes

    if not isinstance(source, Source):
        raise UserError(f"data.classes={data.classes!r} needs random access, which a stream of records does not have; "
                        "store the records with mae_jax inspect --write=array_record")
    return keep_classes(source, data.classes, by_place=data.get("layout") == "0.1.0")


def _located(data: ConfigDict) -> ConfigDict:
    """Returns the group with data.path normalized, which may be a pattern; raises UserError."""
    given = data.get("path") or ""
    if data.source not in MODULES:  # a plug-in may read other paths
        return data
    path = normalized(given, "data.path")
    if path == given:
        return data
    data = data.copy_and_resolve_references()
    data.path = path
    return data


def _found(data: ConfigDict) -> Any:
    """Returns the module or function of data.source; raises UserError with the nearest name."""
    return plugins.find("sources", data.source, MODULES, "data.source", others=("batches",))


def _nothing(data: ConfigDict, expression: str) -> str:
    """Returns the message for a split without images: which setting to change, by the field with the split."""
    used = {"eval_split": "trains without an evaluation split, and another slice, as 'train[70%:]' with "
                          "--config.data.train_split='train[:70%]', may have some",
            "val_split": "(with --config.checkpoint.best_metric='') trains without a part to choose by",
            "train_split": "trains on all there is"}
    field = next((name for name in used if data.get(name) == expression), "")
    value = "train" if field == "train_split" else ""
    what = f": few images make an empty part; --config.data.{field}={value!r} {used[field]}" if field else ""
    return f"the split {expression!r} of data.source={data.source!r} has no images{what}"


def describe(data: ConfigDict, opened: Mapping[str, Any]) -> str:
    """Returns one line about how the splits were found; '' if the source has none.

    Args:
      data: the config group `data`.
      opened: 'train_split', 'val_split' and 'eval_split', those in the config → result of `load`.
    """
    how = getattr(_found(data), "describe", None)
    if data.get("mix"):
        each = mixture.parts(data)
        fields = {field: data[field] for field in opened}
        lines = [how(part, {field: load(part, text) for field, text in fields.items()}) if how else "" for part in each]
        return mixture.describe(data, opened, lines)
    return how(data, opened) if how else ""


def same_split(data: ConfigDict, one: str, other: str) -> bool:
    """Returns whether two split names mean the same images, as 'test' and 'val' do in data without splits."""
    if data.get("mix"):
        return any(same_split(part, one, other) for part in mixture.parts(data))
    named, data = getattr(_found(data), "split_name", lambda data, name: name), _located(data)
    return one == other or named(data, one) == named(data, other)


def open_test_set(data: ConfigDict, text: str, classes: tuple[str, ...]) -> tuple[Source | RecordStream, np.ndarray]:
    """Opens a further test set of TFDS: 'imagenet_v2', or 'NAME:SPLIT' if the split is not 'test'.

    Args:
      data: the config group of the training data, with the label key of TFDS.
      text: the test set.
      classes: names of the training classes.

    Returns:
      The set, and the training class of each of its classes, by name, int32 [classes of the set].

    Raises:
      UserError: the set is missing, or has a class that the training data lack.
    """
    if data.source != "tfds":
        raise UserError(f"eval.sets={text!r} needs data.source='tfds', not {data.source!r}: further test sets are "
                        "those of TFDS")
    name, _, split = text.partition(":")
    data = data.copy_and_resolve_references()
    data.name = name
    found = load(data, split or "test")
    index = {known: number for number, known in enumerate(classes)}
    unknown = [label for label in found.classes if label not in index]
    if unknown or not found.classes:
        what = f"class {unknown[0]!r}, which the training data lack" if unknown else "no classes"
        raise UserError(f"eval.sets={text!r} has {what}: nothing to compare")
    return found, np.array([index[label] for label in found.classes], np.int32)
