"""Batches from TFRecord streams, of TFDS and plain: split among logical readers, each with its own order.

Of R = data.readers readers, reader r owns the r-th of R equal parts of the records, and of the rows of every global
batch. With data.repeats, copies lie among a reader's rows as they lie among a whole batch's (see random_access.draw).
The record at a position therefore depends only on the config, seed and step, not on the number of processes: a process
runs the readers whose rows it feeds. Records that do not divide by R are left out. A run resumes by skipping records.
"""

import bisect
import functools
import itertools
import logging
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from ml_collections import ConfigDict

from mae_jax.data import record_files, tensorflow_cpu
from mae_jax.data.decode import BadImage
from mae_jax.data.readers import process_pool, random_access, stream_batches
from mae_jax.data.readers.makers import StreamMaker
from mae_jax.data.readers.random_access import PADDING, TRIES, Batch
from mae_jax.data.sources.base import UNLABELED, Example, Instruction, RecordStream
from mae_jax.data.sources.tfrecord import odd_record
from mae_jax.data.tensorflow_cpu import UNREADABLE, reason, tf
from mae_jax.data.transforms.example import ExampleBuilder, Fields, FieldSpec, Spec
from mae_jax.data.transforms.graph_builder import GraphBuilder
from mae_jax.errors import UserError, printable
from mae_jax.rng import rng

log = logging.getLogger(__name__)
AHEAD = 16  # encoded records that each reader prefetches; our choice


def dropped_records(stream: RecordStream, config: ConfigDict, group: int = 1) -> range:
    """Returns the records, numbered across all files, that no reader reads.

    Args:
      stream: the training split.
      config: the config.
      group: number of neighboring rows that are mixed.

    Raises:
      UserError: the readers cannot share batch and records evenly, or copies of an image lie too close together.
    """
    readers, batch = config.data.readers, config.batch_size
    if readers < 1 or batch % readers:
        nearest = min((n for n in range(1, batch + 1) if batch % n == 0), key=lambda n: abs(n - readers))
        raise UserError(f"batch_size={batch} is not a multiple of data.readers={readers}; nearest: {nearest}")
    if stream.size < readers:
        raise UserError(f"data.readers={readers} is more than the {stream.size} records; use fewer")
    apart = -(-batch // readers // config.data.repeats)
    if config.data.repeats > 1 and apart < group:
        raise UserError(f"groups of {group} images would mix an image with its own repeats: the {batch // readers} "
                        f"rows of a reader have {apart} images; use fewer data.readers")
    used = stream.size // readers * readers
    return range(stream.start + used, stream.start + stream.size)


def train(stream: RecordStream, step: int, builder: ExampleBuilder, config: ConfigDict, spec: Spec, rows: np.ndarray,
          bad: deque[str]) -> Iterator[Batch]:
    """Yields these rows of the batches step, step + 1, ... without end.

    A bad image's row becomes a copy of a good one of the same reader in the same batch (`replace_bad_rows`), or is a
    gray stand-in. Raises UserError for a corrupt file, or one with another number of records than declared.
    """
    if processes := random_access.workers(config.data, stream.size):
        alone = config.copy_and_resolve_references()
        alone.data.update({"workers": "0", "threads": 1, "prefetch": 1})
        share = config.batch_size // config.data.readers
        maker = StreamMaker(functools.partial(_part_of_train, stream, builder, alone, spec), rows, share, step)
        count = sys.maxsize // config.batch_size - step
        return process_pool.batches(maker, spec, count, processes, config.data.prefetch, config.plugins, bad)
    return _train(stream, step, builder, config, spec, rows, bad)


def _read(stream: RecordStream, *stored: Any) -> Example | BadImage:
    try:
        return stream.example(*stored)
    except BadImage as error:
        return error


def _part_of_train(stream: RecordStream, builder: ExampleBuilder, config: ConfigDict, spec: Spec, step: int,
                   rows: np.ndarray, bad: deque[str]) -> Iterator[Batch]:
    """As `_train`, in a worker process and for its rows."""
    return _train(stream, step, builder, config, spec, rows, bad)


def _train(stream: RecordStream, step: int, builder: ExampleBuilder, config: ConfigDict, spec: Spec, rows: np.ndarray,
           bad: deque[str]) -> Iterator[Batch]:
    """Yields these rows of the batches step, step + 1, ... without end, made by threads of this process."""
    share, per_reader = config.batch_size // config.data.readers, stream.size // config.data.readers
    own = np.unique(rows // share)
    epoch, skip = divmod(random_access.draw(step * share, share, config.data.repeats), per_reader)
    readers = _readers(stream, config, own, share, epoch, skip)
    own_rows = (own[:, None] * share + np.arange(share)).ravel()

    def position_of(count: int) -> int:
        block, row = divmod(count, len(own_rows))
        return (step + block) * config.batch_size + int(own_rows[row])

    def fields_of(result: Fields | BadImage, record: int, position: int) -> Fields:
        if not isinstance(result, BadImage):
            return {**result, "id": record, "valid": 1.0, "replaced": 0}
        bad.append(f"{stream.name(record)}: {result}")
        return {**builder.gray_train(position), "id": record, "replaced": 1}

    def example(count: int, record: int, *stored: Any) -> Fields:
        position = position_of(count)
        try:
            return fields_of(builder.train(stream.example(*stored), position), record, position)
        except BadImage as error:
            return fields_of(error, record, position)

    def examples(items: list[tuple[Any, ...]]) -> list[Fields]:
        records, positions = [item[1] for item in items], [position_of(item[0]) for item in items]
        read = [_read(stream, *stored) for _, _, *stored in items]
        made = iter(builder.train_many([(each, position) for each, position in zip(read, positions, strict=True)
                                        if not isinstance(each, BadImage)]))
        results = [each if isinstance(each, BadImage) else next(made) for each in read]
        return [fields_of(*each) for each in zip(results, records, positions, strict=True)]

    whole = {**spec, "replaced": FieldSpec((config.batch_size,), np.int32)}
    if isinstance(builder, GraphBuilder):
        batches = stream_batches.together(readers, examples, whole, len(own_rows), config.data)
    else:
        batches = stream_batches.one_by_one(readers, example, whole, len(own_rows), config.data)
    keep = np.searchsorted(own_rows, rows)
    for batch in _guarded(stream, batches, skip * len(own)):
        repaired = replace_bad_rows(batch, share, builder.group)
        yield {name: repaired[name] if len(keep) == len(own_rows) else repaired[name][keep] for name in spec}


def replace_bad_rows(batch: Batch, share: int, group: int = 1) -> Batch:
    """Replaces rows with `replaced` > 0 by the next good row of their reader (cyclic, three tries).

    Args:
      batch: fields [rows, ...]; `share` consecutive rows belong to one reader.
      group: number of rows that are mixed. So that no image is mixed with itself, replacements come from the next
        groups, without images of the row's own group. A row keeps its order, which completes those of its group;
        patches and masks are permuted to match.
    """
    broken = batch["replaced"] > 0
    if not broken.any():
        return batch
    source, replaced = np.arange(len(broken)), batch["replaced"].copy()
    for row in np.flatnonzero(broken):
        first = row // share * share
        candidates = [first + (row - first + tries * group) % share for tries in range(1, min(TRIES, share // group))]
        mixed = set(batch["id"][row // group * group : (row // group + 1) * group]) if group > 1 else set()
        good = [tries for tries, other in enumerate(candidates, 1)
                if not broken[other] and batch["id"][other] not in mixed]
        source[row] = candidates[good[0] - 1] if good else row
        replaced[row] = good[0] if good else TRIES
    new = {**{name: value[source] for name, value in batch.items()}, "replaced": replaced}
    if group > 1:
        # Index in the copy of each patch of the row's own order.
        place = np.take_along_axis(np.argsort(new["order"], 1), batch["order"], 1)[..., None]
        for name in ("patches", "pixel_label"):
            if name in new:
                new[name] = np.take_along_axis(new[name], place, 1)
        new["order"] = batch["order"]
    return new


def evaluate(stream: RecordStream, ratio: float, builder: ExampleBuilder, config: ConfigDict, spec: Spec,
             rows: np.ndarray,
             bad: deque[str]) -> Iterator[Batch]:
    """Yields these rows of the first eval.max_examples records, the central `ratio` of each, padded to full batches.

    Every process reads all records and decodes its own rows. Methods that mix neighboring rows mix records in file
    order.
    """
    size, batch = min(stream.size, config.eval.max_examples), config.batch_size
    padding = -size % batch
    records = _records(stream, stream.instructions(0, size))
    nothing = tf.data.Dataset.from_tensors((np.int64(PADDING), *_parse(stream, b"")))
    fed = tf.constant(np.isin(np.arange(batch), rows))
    dataset = records.concatenate(nothing.repeat(padding)).enumerate()
    dataset = dataset.filter(lambda position, _: fed[position % batch]).map(lambda position, item: (position, *item))

    def example(position: int, record: int, *stored: Any) -> Fields:
        gray = builder.gray(position)
        if record == PADDING:
            return {**gray, "id": PADDING, "replaced": 0}
        try:
            fields = builder.evaluate(stream.example(*stored), record, position, ratio)
            return {**fields, "id": record, "valid": 1.0, "replaced": 0}
        except BadImage as error:
            bad.append(f"{stream.name(record)}: {error}")
            return {**gray, "id": record, "replaced": 1}

    batches = stream_batches.one_by_one(dataset, example, spec, len(rows), config.data)
    return _guarded(stream, batches, skipped=0)


def _readers(stream: RecordStream, config: ConfigDict, own: np.ndarray, share: int, epoch: int,
             skip: int) -> tf.data.Dataset:
    """Returns (count, record, *result of `_parse`) without end: `share` records of each own reader in turn."""
    per_reader = stream.size // config.data.readers
    parts = [np.array(stream.instructions(int(number) * per_reader, per_reader), np.int64) for number in own]
    keys = np.array([rng(config.seed, "reader", int(number)).integers(1 << 62) for number in own])
    held = int(config.data.shuffle_mb * 2**20 / config.data.readers / max(stream.mean_bytes, 1))
    held = max(1, min(per_reader, held))

    def reader(parts: tf.RaggedTensor, key: tf.Tensor) -> tf.data.Dataset:
        parts = parts.to_tensor(shape=(None, 3))
        epochs = tf.data.Dataset.range(epoch, np.iinfo(np.int64).max)
        records = epochs.flat_map(lambda e: _epoch(stream, parts, key, e, held)).skip(skip)
        return records.map(lambda record, raw: (record, *_parse(stream, raw))).prefetch(AHEAD)

    numbers = tf.data.Dataset.from_tensor_slices((tf.ragged.stack([tf.constant(part) for part in parts]), keys))
    sources = np.array([random_access.draw(row, share, config.data.repeats) for row in range(share)])
    distinct = int(sources.max()) + 1
    turns = numbers.interleave(reader, cycle_length=len(own), block_length=distinct, num_parallel_calls=len(own),
                               deterministic=True)
    if distinct < share:  # not by unbatch, which crashes the process on empty fields (TensorFlow 2.21)
        turns = turns.batch(distinct).flat_map(lambda *item: tf.data.Dataset.from_tensor_slices(
            tuple(tf.gather(field, sources) for field in item)))
    return turns.enumerate().map(lambda count, item: (count, *item))


def _epoch(stream: RecordStream, parts: tf.Tensor, key: tf.Tensor, epoch: tf.Tensor, held: int) -> tf.data.Dataset:
    """Returns (record, raw bytes) of one reader in one epoch: files in random order, then a shuffle buffer.

    Args:
      parts: the reader's instructions, int64 [n, 3].
      key: the reader's random key; draws are a function of the key and the epoch.
      held: records in the shuffle buffer.
    """
    order = tf.argsort(tf.random.stateless_uniform([tf.shape(parts)[0]], [key, epoch]))
    seed = tf.random.stateless_uniform([], [key + 1, epoch], 0, np.iinfo(np.int64).max, tf.int64)
    records = tf.data.Dataset.from_tensor_slices(tf.gather(parts, order)).flat_map(lambda part: _part(stream, part))
    return records.shuffle(held, seed=seed, reshuffle_each_iteration=False)


def stored(stream: RecordStream, faults: list[str] | None = None) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yields record number and the arguments of `RecordStream.example` of every record, in order.

    Args:
      stream: its files may be damaged or incomplete.
      faults: receives a message per such file, of which the readable records are yielded; None: UserError is raised.
    """
    parts = stream.instructions(0, stream.size)
    while parts:
        records, done = _records(stream, parts).with_options(tensorflow_cpu.options()), 0
        try:
            for record, *fields in records.as_numpy_iterator():
                yield record, tuple(fields)
                done += 1
            return
        except UNREADABLE as error:
            ends = list(itertools.accumulate(take for _, _, take in parts))
            at = bisect.bisect_left(ends, done)
            wrong = fault(stream, parts[at][0])
            if not wrong and done == ends[at] < ends[-1]:  # the fault is in the next part, at its first record
                at += 1
                wrong = fault(stream, parts[at][0])
            if faults is None:
                raise UserError(wrong or f"reading records failed: {reason(error)}") from None
            faults.append(wrong or f"{printable(stream.files[parts[at][0]])} does not read: {reason(error)}")
            parts = parts[at + 1:]


def _records(stream: RecordStream, instructions: list[Instruction]) -> tf.data.Dataset:
    """Returns (record, *result of `_parse`) of the instructions, in order."""
    parts = tf.data.Dataset.from_tensor_slices(np.array(instructions, np.int64).reshape(-1, 3))
    return parts.flat_map(lambda part: _part(stream, part)).map(lambda record, raw: (record, *_parse(stream, raw)))


def _part(stream: RecordStream, part: tf.Tensor) -> tf.data.Dataset:
    """Returns (record, raw bytes) of one instruction; fails if the file has another number of records than declared."""
    file, skip, take = tf.unstack(part, 3)
    offsets = np.concatenate([[0], np.cumsum(stream.counts)[:-1]]).astype(np.int64)
    to_the_end = tf.equal(skip + take, tf.gather(np.array(stream.counts, np.int64), file))
    path = tf.gather(list(stream.files), file)
    compression, readable = tf.numpy_function(_opening, [path], [tf.string, tf.int64])
    raw = tf.data.TFRecordDataset(path, tf.ensure_shape(compression, [])).take(tf.ensure_shape(readable, []))
    raw = raw.skip(skip).take(tf.where(to_the_end, np.int64(-1), take))  # -1: all, so that surplus records are noticed
    raw = raw.apply(tf.data.experimental.assert_cardinality(take))
    return raw.enumerate(tf.gather(offsets, file) + skip)


def _opening(path: bytes) -> tuple[bytes, np.int64]:
    compression, readable = record_files.opening(path.decode())
    return compression.encode(), np.int64(readable)


def _parse(stream: RecordStream, raw: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Parses image, label, labels uint8 [C] ([0] if there is one label) and mask, for `RecordStream.example`.

    A record without an image, or without its mask, gives empty bytes, which make it a bad image.
    """
    features = {key: tf.io.FixedLenFeature([], tf.string, "") for key in (stream.image_key, stream.mask_key) if key}
    if stream.label_key:
        one = tf.io.FixedLenFeature([], tf.int64, UNLABELED)
        features[stream.label_key] = tf.io.VarLenFeature(tf.int64) if stream.multi_label else one
    example = tf.io.parse_single_example(raw, features)
    label, labels = tf.constant(UNLABELED, tf.int64), tf.zeros([0], tf.uint8)
    if stream.multi_label:
        present = tf.one_hot(example[stream.label_key].values, len(stream.classes), dtype=tf.uint8)
        labels = tf.reduce_max(present, axis=0)
    elif stream.label_key:
        label = example[stream.label_key]
    return example[stream.image_key], label, labels, example.get(stream.mask_key, tf.constant(""))


def _guarded(stream: RecordStream, batches: Iterator[Any], skipped: int) -> Iterator[Any]:
    """Yields the batches; logs the time that skipping took, and names the file in the error if reading fails."""
    begin = time.monotonic()
    try:
        for number, batch in enumerate(batches):
            if number == 0 and skipped:
                log.info("resumed the stream: skipped %d records in %.1f s", skipped, time.monotonic() - begin)
            yield batch
    except UNREADABLE as error:
        wrong = filter(None, (fault(stream, file) for file in range(len(stream.files))))
        raise UserError(next(wrong, f"reading records failed: {reason(error)}")) from None


def fault(stream: RecordStream, file: int) -> str:
    """Reads a file to its end; returns how it differs from what is declared, '' if it does not."""
    name, promised, found = printable(stream.files[file]), stream.counts[file], 0
    try:
        compression, readable = record_files.opening(stream.files[file])
        records = tf.data.TFRecordDataset(stream.files[file], compression).take(readable)
        for raw in records.with_options(tensorflow_cpu.options()):
            tf.train.Example.FromString(raw.numpy())
            found += 1
        if readable >= 0 and found != promised and found == readable:
            problem = record_files.look(stream.files[file]).problem
            if not problem.startswith("it ends within"):  # like a file that lacks whole records
                return f"{name} is damaged after record {found} of {promised}: {problem}"
    except UserError as error:
        return str(error)
    except tf.errors.OpError as error:
        what = "is damaged" if isinstance(error, tf.errors.DataLossError) else "does not read"
        return f"{name} {what} after record {found} of {promised}: {reason(error)}"
    except DecodeError:
        return f"{name} is damaged after record {found} of {promised}: the next one is no tf.train.Example"
    if found != promised:
        return f"{name} has {found} records where {promised} are promised; write the data again, or mend its metadata"
    return odd_record(stream.files[file], stream.image_key, "" if stream.multi_label else stream.label_key)
