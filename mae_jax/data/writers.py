"""Writes resized images once: as TFRecord files, as array_record through TFDS, or as finished batches."""

import contextlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from etils import epath
from PIL import Image

from mae_jax.data import Inputs, OpenedData, Spec
from mae_jax.data.decode import BadImage, StoredImage
from mae_jax.data.masking import PatchOrder, View, with_views
from mae_jax.data.readers import cached_batches, random_access
from mae_jax.data.reading import AS_STORED, Reading
from mae_jax.data.sources import base
from mae_jax.data.sources.base import Example, Source
from mae_jax.errors import UserError
from mae_jax.ops.example_ids import whole
from mae_jax.rng import rng
from mae_jax.runtime import progress

QUALITY = 95  # JPEG quality
PER_FILE = 4096  # records in a TFRecord file: about 150 MB of images with a short side of 256
NAME, VERSION = "pictures", "1.0.0"  # of the data set that TFDS writes
READ_AHEAD = 256  # images that are read ahead

Found = Source | base.RecordStream
Changed = TypeVar("Changed")


def stored(source: Found, mixed: bool, faults: list[str] | None) -> Iterator[tuple[int, Callable[[], Example]]]:
    """Yields number and reader of every example; `mixed` visits sources with random access in a fixed random order."""
    if isinstance(source, base.RecordStream):
        from mae_jax.data.readers import record_stream

        for record, fields in record_stream.stored(source, faults):
            yield record, lambda fields=fields: source.example(*fields)
    else:
        order = rng(0, "write", 0).permutation(source.size) if mixed else range(source.size)
        for i in order:
            yield int(i), lambda i=int(i): source.read(i)


def each(source: Found, change: Callable[[Example], Changed], threads: int, mixed: bool = False,
         faults: list[str] | None = None) -> Iterator[tuple[int, Changed | BadImage | OSError]]:
    """Yields the number of every example, and `change` of it, computed in threads; holds few examples in memory.

    The number is an argument of the source's `name`. A bad image yields its error instead. For `faults`, see
    `record_stream.stored`.
    """
    def one(item: tuple[int, Callable[[], Example]]) -> tuple[int, Changed | BadImage | OSError]:
        number, read = item
        try:
            return number, change(read())
        except (BadImage, OSError) as error:
            return number, error

    items = stored(source, mixed, faults)
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(itertools.islice(items, READ_AHEAD)):
            yield from pool.map(one, chunk)


def shrink(example: Example, size: int, reading: Reading = AS_STORED) -> Example:
    """Returns the example, without mask, as a JPEG with a short side of at most `size`; a small JPEG stays as it is.

    A re-encoded image has no EXIF: it is upright, or in stored orientation.

    Raises:
      BadImage: the image does not decode.
    """
    opened = StoredImage(example.image, reading=reading)
    image = opened.whole()
    short = min(image.size)
    if short <= size and isinstance(example.image, bytes) and opened.format == "JPEG":
        return example
    if short > size:
        target = [max(size, round(side * size / short)) for side in image.size]
        image = image.resize(target, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return Example(file.getvalue(), example.label)


def write_tfrecord(found: dict[str, Found], folder: epath.Path, size: int, threads: int,
                    reading: Reading = AS_STORED) -> dict[str, list[str]]:
    """Writes splits as TFRecord files with a records.json; data.source='tfrecord' reads the folder.

    Returns:
      Split → names of the broken images, which are left out, with the reason.

    Raises:
      UserError: the folder has records already, or images have several labels.
    """
    _check_storable(found)
    from mae_jax.data.sources import tfrecord
    from mae_jax.data.tensorflow_cpu import tf

    if (folder / tfrecord.RECORDS).exists():
        raise UserError(f"{folder} holds {tfrecord.RECORDS} already; name another folder, or remove this one")
    folder.mkdir(parents=True, exist_ok=True)
    records, broken = {}, {}
    for split, source in found.items():
        broken[split], files = [], -(-source.size // PER_FILE)
        examples = _good(source, size, threads, broken[split], reading, mixed=True)
        for number in range(files):
            name = f"{split}-{number:05d}-of-{files:05d}.tfrecord"
            with tf.io.TFRecordWriter(str(folder / name)) as file:
                records[name] = sum(1 for _ in map(file.write, map(_serialize, itertools.islice(examples, PER_FILE))))
    classes = next(iter(found.values())).classes
    (folder / tfrecord.RECORDS).write_text(json.dumps({"records": records, "classes": classes}, indent=1))
    return broken


def write_array_record(found: dict[str, Found], folder: epath.Path, size: int, threads: int,
                    reading: Reading = AS_STORED) -> dict[str, list[str]]:
    """Writes splits as a TFDS data set in array_record, which has random access; otherwise as `write_tfrecord`."""
    from mae_jax.data.sources import tfds

    api = tfds.api()
    _check_storable(found)
    if (folder / NAME / VERSION).exists():
        raise UserError(f"{folder} holds the data set {NAME} already; name another folder, or remove this one")
    classes = next(iter(found.values())).classes
    features = {"image": api.features.Image(encoding_format="jpeg")}
    if classes:
        features["label"] = api.features.ClassLabel(names=classes)
    broken = {split: [] for split in found}

    def keyed(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, example in enumerate(_good(found[split], size, threads, broken[split], reading)):
            yield key, {"image": io.BytesIO(example.image), **({"label": example.label} if classes else {})}

    api.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints a line about downloading
        api.dataset_builders.store_as_tfds_dataset(
            NAME, VERSION, features=api.features.FeaturesDict(features), data_dir=str(folder),
            file_format="array_record", split_datasets={split: keyed(split) for split in found})
    return broken


def _check_storable(found: dict[str, Found]) -> None:
    for source in found.values():
        if "labels" in source.fields:
            raise UserError("images are stored with one label each, and these have several; use --write=batches")


def write_batches(opened: OpenedData, inputs: Inputs, spec: Spec, order: PatchOrder, views: tuple[View, ...],
                  folder: epath.Path, steps: int) -> None:
    """Writes the first training batches of a run, and its evaluations; data.source='batches' reads the folder.

    Args:
      opened: the data.
      inputs: from `opened.batches`, with the same spec, order and views.
      folder: is created, and must not hold batches.
      steps: number of training batches to write.

    Raises:
      UserError: the folder holds batches already.
    """
    if (folder / "meta.json").exists():
        raise UserError(f"{folder} holds cached batches already; name another folder, or remove this one")
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": itertools.islice(inputs.train(0), steps), "support": inputs.support(),
             "evaluate": inputs.evaluate(), **({"validate": inputs.validate()} if inputs.num_val else {})}
    for name, found in parts.items():
        with (folder / f"{name}.npz").open("wb") as file:
            np.savez(file, **_joined(found, with_views(spec, views) if name == "train" else spec))
    meta = {"classes": inputs.classes, "num_train": inputs.num_train, "multi_label": "labels" in spec,
            **cached_batches.hiding(order, views),
            **cached_batches.joined_from(opened.config, opened.info.clusters)}
    (folder / "meta.json").write_text(json.dumps(meta))


def _joined(found: Iterable[random_access.Batch], spec: Spec) -> random_access.Batch:
    """Concatenates the fields of all batches, without padding; returns empty fields if there is no batch."""
    found = list(found) or [{name: np.zeros((0, *struct.shape[1:]), struct.dtype) for name, struct in spec.items()}]
    fields = {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}
    real = whole(fields["id"]) != random_access.PADDING
    return {name: value[real] for name, value in fields.items()}


def _good(source: Found, size: int, threads: int, broken: list[str], reading: Reading,
          mixed: bool = False) -> Iterator[Example]:
    """Yields the good examples with a short side of at most `size`, and adds the broken ones to `broken`."""
    with progress.doing("writing", source.size) as line:
        for number, example in each(source, lambda example: shrink(example, size, reading), threads, mixed):
            line.advance()
            if isinstance(example, Exception):
                broken.append(f"{source.name(number)}: {example}")
            else:
                yield example


def _serialize(example: Example) -> bytes:
    from mae_jax.data.tensorflow_cpu import tf

    image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[example.image]))
    label = tf.train.Feature(int64_list=tf.train.Int64List(value=[example.label]))
    features = {"image": image, **({"label": label} if example.label >= 0 else {})}
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
