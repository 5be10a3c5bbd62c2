"""Small data sets of records for tests: files of TFDS and plain ones, whole and harmed; image i is of gray i."""

import io
import itertools
import json
import struct

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mae_jax import config as configs
from mae_jax import data
from mae_jax.data.tensorflow_cpu import tf
from tests.helpers.tiny import tiny_method

TRAIN, TEST = 61, 11


def jpeg(i):
    file = io.BytesIO()
    Image.new("RGB", (24, 24), (i, i, i)).save(file, "JPEG", quality=95)
    file.seek(0)
    return file


def store(folder, file_format, labeled=True):
    features = {"image": tfds.features.Image(encoding_format="jpeg")}
    if labeled:
        features["label"] = tfds.features.ClassLabel(names=["a", "b", "c"])
    sets = {split: [(i, {"image": jpeg(i), "label": i % 3} if labeled else {"image": jpeg(i)}) for i in range(size)]
            for split, size in (("train", TRAIN), ("test", TEST))}
    tfds.dataset_builders.store_as_tfds_dataset(
        "toy", "1.0.0", features=tfds.features.FeaturesDict(features), split_datasets=sets, data_dir=str(folder),
        file_format=file_format, disable_shuffling=True)
    return folder


def record(i, label=True):
    feature = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg(i).read()]))}
    if label:
        feature["label"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[i % 3]))
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def write(path, records):
    with tf.io.TFRecordWriter(str(path)) as file:
        for raw in records:
            file.write(raw)


def write_shards(folder):
    """Five files of 3, 11, 0, 20 and 16 records."""
    numbers = iter(range(50))
    for shard, size in enumerate((3, 11, 0, 20, 16)):
        write(folder / f"train-{shard}.tfrecord", [record(next(numbers)) for _ in range(size)])
    write(folder / "test-0.tfrecord", [record(i) for i in range(7)])
    return folder


def config(source, path, **fields):
    c = configs.default()
    c.batch_size = 8
    c.data.update({"source": source, "path": str(path), "image_size": (16, 16), "readers": 4, "threads": 2,
                   "augment": "none", **fields})
    c.model.patch = (8, 8)
    return c


def tfds_config(stored, **fields):
    return config("tfds", stored, name="toy", **fields)


def plain_config(shards, **fields):
    return config("tfrecord", shards / "{split}-*.tfrecord", **fields)


def build(c, rows=None):
    method = tiny_method(c)
    return data.OpenedData(c).batches(method.batch_spec(), method.patch_order(), rows=rows)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def assert_pixels_belong_to_ids(batch):
    shown = batch["patches"].reshape(len(batch["id"]), -1).mean(1)
    np.testing.assert_allclose(shown, batch["id"], atol=1.5)
    np.testing.assert_array_equal(batch["label"], batch["id"] % 3)


def describe(shards):
    """Writes records.json beside the five files."""
    counts = {f"train-{shard}.tfrecord": size for shard, size in enumerate((3, 11, 0, 20, 16))}
    described = {"records": {**counts, "test-0.tfrecord": 7}, "classes": ["x", "y", "z"]}
    (shards / "records.json").write_text(json.dumps(described))
    return config("tfrecord", shards)


def starts(raw):
    """Where each record of a file begins, and the end of the file."""
    found = [0]
    while found[-1] < len(raw):
        found.append(found[-1] + struct.unpack("<Q", raw[found[-1]:found[-1] + 8])[0] + 16)
    return found


HARM = {  # what → what becomes of the bytes of a file, whose record 5 begins `at`, and ends before `end`
    "cut in the length": lambda raw, at, end: raw[:at + 3],
    "cut after the length": lambda raw, at, end: raw[:at + 8],
    "cut in the length's checksum": lambda raw, at, end: raw[:at + 10],
    "cut before the payload": lambda raw, at, end: raw[:at + 12],
    "cut in the payload": lambda raw, at, end: raw[:at + 100],
    "cut before the checksum": lambda raw, at, end: raw[:end - 4],
    "cut in the checksum": lambda raw, at, end: raw[:end - 2],
    "flipped length": lambda raw, at, end: raw[:at + 1] + bytes([raw[at + 1] ^ 1]) + raw[at + 2:],
    "flipped checksum of the length": lambda raw, at, end: raw[:at + 9] + bytes([raw[at + 9] ^ 1]) + raw[at + 10:],
    "flipped payload": lambda raw, at, end: raw[:at + 60] + bytes([raw[at + 60] ^ 1]) + raw[at + 61:],
    "flipped checksum": lambda raw, at, end: raw[:end - 1] + bytes([raw[end - 1] ^ 1]) + raw[end:],
    "cut between records": lambda raw, at, end: raw[:at],
    "without a record": lambda raw, at, end: raw[:at] + raw[end:],
    "with one twice": lambda raw, at, end: raw[:end] + raw[at:],
    "emptied": lambda raw, at, end: b"",
}


def harm(what, path):
    raw = path.read_bytes()
    path.write_bytes(HARM[what](raw, *starts(raw)[5:7]))
