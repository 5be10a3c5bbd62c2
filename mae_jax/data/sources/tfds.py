"""data.source=tfds: a prepared data set of TensorFlow Datasets, read from data.path (its data_dir), local or gs://.

Nothing is downloaded; nothing in the data set's metadata is executed, or leads out of its folder. Data stored as
array_record have random access; TFRecord files are a stream.
"""

import difflib
import functools
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.data.decode import BadImage, decode_mask
from mae_jax.data.sources import splits
from mae_jax.data.sources.base import UNLABELED, Example, RecordStream, Source, known_split, multi_hot, numbered_name
from mae_jax.data.sources.expected_sizes import check_size
from mae_jax.data.tensorflow_cpu import tf
from mae_jax.errors import UserError, did_you_mean, printable
from mae_jax.runtime import bounded_json
from mae_jax.storage.file_kinds import unreadable
from mae_jax.storage.paths import locate

METADATA = {"features.json": "pythonClassName", "dataset_info.json": "splits"}  # file → key that it must have
FETCHED = 1024  # records fetched at a time for their labels


def load(data: ConfigDict, split: splits.Split) -> Source | RecordStream:
    """Opens a split; raises UserError if the data set is unknown, not prepared, or without images."""
    module = api()
    builder = _builder(module, data)
    known_split(split, tuple(builder.info.splits))
    features, image_key, label_key = dict(builder.info.features), data.image_key, data.label_key
    if not isinstance(features.get(image_key), module.features.Image):
        pictures = [name for name, feature in features.items() if isinstance(feature, module.features.Image)]
        raise UserError(f"data.name={data.name!r} has no image data.image_key={image_key!r}; "
                        f"{did_you_mean(image_key, pictures)}")
    if data.mask_key and not isinstance(features.get(data.mask_key), module.features.Image):
        raise UserError(f"data.name={data.name!r} has no mask data.mask_key={data.mask_key!r}; "
                        f"{did_you_mean(data.mask_key, features)}")
    if data.mask_key and builder.info.name == "scene_parse150":
        raise UserError("data.name='scene_parse150': TFDS's masks are of 100 kinds of instances, not of the 150 "
                        "classes; --config=upernet and --config=segment:scene_parse150 read ADEChallengeData2016")
    classes, multi_label = _classes(module, features.get(label_key))
    info = builder.info.splits[split.name]
    check_size("/".join(filter(None, (builder.info.name, builder.info.config_name))), split.name, info.num_examples)
    _check_files(builder, info)
    if builder.info.file_format.file_suffix == "array_record":
        return _random_access(module, builder, data, split.name, classes, multi_label).sliced(split)
    start, stop = split.bounds(info.num_examples)
    return RecordStream(
        files=tuple(str(path) for path in info.filepaths), counts=tuple(info.shard_lengths), start=start,
        size=stop - start, mean_bytes=info.num_bytes / max(info.num_examples, 1), image_key=image_key,
        label_key=label_key if classes else "", classes=classes, multi_label=multi_label, mask_key=data.mask_key,
        mask_offset=data.mask_offset, promised_by="dataset_info.json")


@functools.cache
def api() -> Any:
    """Returns the tensorflow_datasets module; raises UserError with the pip command without it."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(f"data.source='tfds' needs TensorFlow Datasets ({error}): "
                        "pip install tensorflow-datasets") from error
    _keep_from_importing(tensorflow_datasets.features.FeatureConnector)
    return tensorflow_datasets


def _keep_from_importing(connector: Any) -> None:
    """Restricts TFDS to its own feature classes: it would import any module that a features.json names."""
    make = connector.cls_from_name

    def checked(name: str) -> Any:
        if not name:
            raise ValueError("a feature of no class")
        if not name.startswith("tensorflow_datasets."):
            raise UserError(f"the data set's features.json names the class {printable(name)!r}, which is not TFDS's "
                            "and would be executed; read the images with data.source='tfrecord'")
        return make(name)

    connector.cls_from_name = staticmethod(checked)


def _check_files(builder: Any, info: Any) -> None:
    """Raises UserError if files of a split lie outside the data set's folder, or are missing."""
    root, paths = builder.data_path, [epath.Path(path) for path in info.filepaths]
    outside = [path for path in paths if not path.is_relative_to(root) or ".." in path.parts]
    if outside:
        raise UserError(f"the data set's metadata point outside of its folder {root}, to {printable(str(outside[0]))}")
    there = {path for folder in {path.parent for path in paths} if folder.is_dir() for path in folder.iterdir()}
    missing = sorted(str(path) for path in paths if path not in there)
    if missing:
        raise UserError(f"{len(missing)} of the {len(paths)} files of {info.name!r} are missing, such as {missing[0]}; "
                        "restore them, or prepare the data set again")


def _builder(module: Any, data: ConfigDict) -> Any:
    if not data.name:
        raise UserError("data.source='tfds' needs data.name, such as 'imagenet2012' or 'imagenet_resized/64x64'")
    try:
        if module.core.naming.parse_builder_name_kwargs(data.name)[0].namespace:  # NAME:VERSION has no namespace
            raise UserError(f"data.name={data.name!r} names another catalog, whose code would be downloaded and run; "
                            "prepare the data set first, and give its name only, or NAME:VERSION")
        builder = module.builder(data.name, data_dir=data.path or None)
    except UserError:
        raise
    except Exception as error:  # TFDS raises many types for broken metadata, DatasetNotFoundError too
        if wrong := _unreadable_metadata(data):
            raise UserError(wrong) from None
        if not isinstance(error, module.core.DatasetNotFoundError | ValueError):
            raise
        known = module.list_builders(with_community_datasets=False)  # those are looked up in a bucket
        close = difflib.get_close_matches(data.name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"TFDS has no data set {data.name!r}, and there is none in data.path={data.path!r}"
                        f"{hint}") from error
    if not builder.info.splits:
        raise UserError(f"{data.name} is not prepared under {builder.data_path}; prepare it with `tfds build "
                        f"{data.name} --data_dir=DIR` and pass --config.data.path=DIR (nothing is downloaded here)")
    return builder


def _unreadable_metadata(data: ConfigDict) -> str:
    """Returns what is wrong with the first unreadable metadata file of a data set; '' for none."""
    root = locate(data.path or "~/tensorflow_datasets", "data.path") / data.name.split(":")[0]
    for pattern in ("*/", "*/*/") if root.is_dir() else ():
        for name, key in METADATA.items():
            for file in sorted(root.glob(pattern + name)):
                content = file.read_bytes()
                try:
                    if key not in bounded_json.parse_object(content):
                        raise ValueError(f"it has no {key!r}")
                except ValueError as error:
                    return f"{unreadable(file, content, error)}; prepare the data set again"
    return ""


def _classes(module: Any, feature: Any) -> tuple[tuple[str, ...], bool]:
    """Returns the class names of a feature, () if it is no label, and whether images have several labels."""
    several = isinstance(feature, module.features.Sequence)
    label = feature.feature if several else feature
    return (tuple(label.names), several) if isinstance(label, module.features.ClassLabel) else ((), False)


def _random_access(module: Any, builder: Any, data: ConfigDict, split: str, classes: tuple[str, ...],
                   multi_label: bool) -> Source:
    image_key, label_key, mask_key = data.image_key, data.label_key, data.mask_key
    pictures = [key for key, feature in builder.info.features.items() if isinstance(feature, module.features.Image)]
    encoded = {key: module.decode.SkipDecoding() for key in pictures}
    rows = builder.as_data_source(split, decoders=encoded)
    read = functools.partial(_read, rows, _Wanted(image_key, label_key if classes else "", mask_key), len(classes),
                             multi_label, data.mask_offset)
    fields = ("labels",) * multi_label + ("pixel_label",) * bool(mask_key)
    fetched = functools.cache(lambda block: _labels(rows, block * FETCHED, label_key))
    label = (lambda i: int(fetched(i // FETCHED)[i % FETCHED])) if classes and not multi_label else None
    return Source(len(rows), read, functools.partial(numbered_name, f"{data.name} {split}"), classes, fields, label)


class _Wanted(NamedTuple):
    """Names of the features to read, '' for none."""

    image: str
    label: str
    mask: str


def _read(rows: Any, wanted: _Wanted, classes: int, multi_label: bool, offset: int, i: int) -> Example:
    try:
        row = rows[i]
    except Exception as error:  # array_record raises RuntimeError for damage
        raise BadImage(f"the record cannot be read: {str(error).splitlines()[0][:80]}") from error
    if any(row[key] is None for key in wanted if key):  # array_record returns None past a truncation
        raise BadImage("the record is empty")
    return Example(row[wanted.image], int(row[wanted.label]) if classes and not multi_label else UNLABELED,
                   multi_hot(row[wanted.label], classes) if multi_label else None,
                   decode_mask(row[wanted.mask], offset) if wanted.mask else None)


def _labels(rows: Any, first: int, label_key: str) -> np.ndarray:
    """Returns the labels of rows first, first + 1, ..., int32 [FETCHED], or fewer at the end.

    Rows are fetched in batches, since a bucket has a high latency; each record is fetched in full, with its image.
    """
    numbers = range(first, min(first + FETCHED, len(rows)))
    try:
        return np.array([row[label_key] for row in rows.__getitems__(numbers)], np.int32)
    except Exception:  # a damaged record: the whole batch fails
        return np.array([_label(rows, number, label_key) for number in numbers], np.int32)


def _label(rows: Any, number: int, label_key: str) -> int:
    try:
        return int(rows[number][label_key])
    except Exception:  # RuntimeError for damage, None past a truncation
        return UNLABELED


tf.get_logger().setLevel("ERROR")  # TFDS logs through it
