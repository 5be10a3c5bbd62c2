"""TFRecord streams, on data sets that TFDS itself wrote and on plain files."""

from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mae_jax.data.readers import record_stream
from mae_jax.data.sources import registry, splits, tfrecord
from mae_jax.data.tensorflow_cpu import tf
from mae_jax.errors import UserError
from tests.helpers.records import (
    TEST,
    assert_equal,
    assert_pixels_belong_to_ids,
    build,
    plain_config,
    record,
    store,
    take,
    tfds_config,
    write,
    write_shards,
)
from tests.helpers.tiers import slow


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return store(tmp_path_factory.mktemp("tfds"), "tfrecord")


def test_readers_get_the_parts_of_even_splits(stored):
    stream = registry.load(tfds_config(stored).data, "train[10%:]")
    builder = tfds.builder("toy", data_dir=str(stored))
    for readers in (1, 4, 7):
        for number, split in enumerate(tfds.even_splits("train[10%:]", readers, drop_remainder=True)):
            theirs = builder.info.splits[split].file_instructions
            size = stream.size // readers
            ours = stream.instructions(number * size, size)
            assert [(stream.files[file], skip, count) for file, skip, count in ours] == [
                (part.filename, part.skip, part.examples_in_shard - part.skip if part.take == -1 else part.take)
                for part in theirs]


@pytest.mark.parametrize("make", [tfds_config, plain_config])
def test_each_epoch_holds_each_record_of_each_reader_once(request, make):
    c = make(request.getfixturevalue("stored" if make is tfds_config else "shards"))
    inputs = build(c)
    per_reader = inputs.num_train // 4  # 15, 12
    found = take(inputs.train(0), per_reader)  # 2 rows a step: two epochs
    for batch in found:
        assert_pixels_belong_to_ids(batch)
    for reader in range(4):
        ids = np.concatenate([batch["id"][2 * reader:2 * reader + 2] for batch in found])
        own = set(range(reader * per_reader, (reader + 1) * per_reader))
        assert set(ids[:per_reader]) == set(ids[per_reader:]) == own
        assert list(ids[:per_reader]) != list(ids[per_reader:])


@pytest.mark.parametrize("step", [1, 7, 8, 20])
def test_a_resumed_stream_goes_on_as_the_unbroken_one(stored, step):
    c = tfds_config(stored, augment="random")
    unbroken = take(build(c).train(0), 23)
    assert_equal(take(build(c).train(step), 3), unbroken[step:step + 3])


def test_resuming_says_how_long_it_took(stored, caplog):
    caplog.set_level("INFO", logger="mae_jax")
    next(build(tfds_config(stored)).train(3))
    assert "skipped 24 records in" in caplog.text


@pytest.mark.parametrize("parts", [
    slow(((0, 1, 2, 3), (4, 5, 6, 7))), ((0, 3, 5), (1, 2, 4, 6, 7))])
def test_processes_feed_the_rows_that_one_process_would(shards, parts):
    c = plain_config(shards, augment="random")
    whole = take(build(c).train(5), 4)
    evaluation = list(build(c).support())
    for rows in parts:
        part = build(c, np.array(rows))
        assert_equal(take(part.train(5), 4), [{k: v[list(rows)] for k, v in batch.items()} for batch in whole])
        assert_equal(list(part.support()), [{k: v[list(rows)] for k, v in batch.items()} for batch in evaluation])


def test_threads_change_nothing(stored):
    one, two = tfds_config(stored, threads=1), tfds_config(stored, threads=5)
    assert_equal(take(build(one).train(0), 6), take(build(two).train(0), 6))


def test_the_seed_changes_the_order(stored):
    one, two = tfds_config(stored), tfds_config(stored)
    two.seed = 1
    assert list(next(build(one).train(0))["id"]) != list(next(build(two).train(0))["id"])


def test_a_small_buffer_still_gives_each_record_once(shards):
    inputs = build(plain_config(shards, shuffle_mb=0, readers=2))
    batches = take(inputs.train(0), 6)
    ids = np.concatenate([batch["id"] for batch in batches])
    assert max(Counter(ids).values()) == 1


def test_evaluations_read_in_order_and_are_padded(stored):
    inputs = build(tfds_config(stored))
    batches = list(inputs.evaluate())
    assert np.concatenate([batch["id"] for batch in batches]).tolist() == [*range(TEST), *[-1] * 5]
    assert batches[1]["valid"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert_pixels_belong_to_ids(batches[0])


def test_left_over_records_are_named_and_not_counted(stored):
    inputs = build(tfds_config(stored))
    assert inputs.num_train == 60
    assert "left out by 4 readers: 1, from " in inputs.description
    assert "record 60" in inputs.description


@pytest.mark.parametrize(("fields", "text"), [
    ({"readers": 3}, "data.readers=3.* 2"), ({"readers": 0}, "data.readers=0.* 1"),
    ({"train_split": "train[:3]"}, "more than the 3 records"), ({"train_split": "trian"}, "'trian'.* 'train'"),
    ({"image_key": "picture"}, "image")])
def test_what_cannot_be_shared_or_found_is_refused(stored, fields, text):
    with pytest.raises(UserError, match=text):
        build(tfds_config(stored, **fields))


def test_data_without_labels_stream_too(tmp_path):
    inputs = build(tfds_config(store(tmp_path, "tfrecord", labeled=False)))
    assert inputs.classes == ()
    assert (next(inputs.train(0))["label"] == -1).all()


def test_bad_pictures_are_replaced_within_their_reader_and_named(shards):
    def broken(i):
        feature = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"text"]))}
        return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()
    write(shards / "train-3.tfrecord", [broken(i) if i in (17, 30) else record(i) for i in range(14, 34)])
    c = plain_config(shards, readers=2)
    inputs = build(c)
    batches = take(inputs.train(0), 6)
    replaced = np.concatenate([batch["replaced"] for batch in batches])
    ids = np.concatenate([batch["id"] for batch in batches])
    assert sorted(replaced)[-2:] == [1, 1]
    assert len(inputs.bad) == 2
    assert any("train-3.tfrecord, record 3" in name for name in inputs.bad)
    assert not {17, 30} & set(ids)
    for batch in batches:
        assert (batch["valid"] == 1).all()
        for row in np.flatnonzero(batch["replaced"]):
            assert batch["id"][row] in batch["id"][[r for r in range(row // 4 * 4, row // 4 * 4 + 4) if r != row]]
            shown = batch["patches"][row].mean()
            assert abs(shown - batch["id"][row]) < 1.5
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7]):
        part = build(c, np.array(rows))
        assert_equal(take(part.train(2), 4), [{k: v[rows] for k, v in batch.items()} for batch in batches[2:]])


def test_a_reader_with_only_bad_pictures_gives_gray_ones():
    batch = {"id": np.arange(8), "valid": np.array([0.0] * 4 + [1.0] * 4), "replaced": np.array([1] * 4 + [0] * 4)}
    repaired = record_stream.replace_bad_rows(batch, share=4)
    assert repaired["replaced"].tolist() == [4] * 4 + [0] * 4
    assert repaired["valid"].tolist() == [0] * 4 + [1] * 4
    assert repaired["id"].tolist() == list(range(8))


def test_the_next_good_picture_is_taken_cyclically_within_three_tries():
    replaced = np.array([0, 1, 1, 1, 1, 0, 0, 1])
    batch = {"id": np.arange(8), "replaced": replaced}
    assert record_stream.replace_bad_rows(batch, share=8)["id"].tolist() == [0, 1, 5, 5, 5, 5, 6, 0]
    assert record_stream.replace_bad_rows(batch, share=8)["replaced"].tolist() == [0, 4, 3, 2, 1, 0, 0, 1]


def test_slices_of_a_stream_are_ranges_of_records(shards):
    stream = tfrecord.load(plain_config(shards).data, splits.parse("train[5:20]"))
    assert (stream.start, stream.size) == (5, 15)
    assert stream.instructions(0, 15) == [(1, 2, 9), (3, 0, 6)]
    assert stream.name(5).endswith("train-1.tfrecord, record 2")


def test_a_sum_of_streams_reads_the_files_of_both_and_not_what_a_slice_left_out(shards):
    c = plain_config(shards).data
    both, train, test = (registry.load(c, text) for text in ("train+test", "train", "test"))
    assert both.size == train.size + test.size
    assert both.instructions(0, both.size) == [
        *train.instructions(0, train.size),
        *((file + len(train.files), *part) for file, *part in test.instructions(0, test.size))]
    assert [both.name(train.size + i) for i in range(test.size)] == [test.name(i) for i in range(test.size)]
    assert registry.load(c, "train[5:]+test[:2]").size == train.size - 5 + min(2, test.size)
    for text in ("train[:5]+test", "train+test[1:]"):
        with pytest.raises(UserError, match="'train\\+validation'"):
            registry.load(c, text)


def test_a_copy_has_the_order_of_its_own_place_in_a_group():
    draws = np.random.default_rng(0)
    rasters = draws.integers(0, 255, (6, 6, 12), np.uint8)
    shared = draws.permutation(6)
    orders = np.stack([np.roll(shared, -3 * (row % 2)) for row in range(6)]).astype(np.int32)
    patches = np.stack([raster[order] for raster, order in zip(rasters, orders, strict=True)])
    batch = {"patches": patches, "order": orders, "id": np.arange(6), "replaced": np.array([1, 0, 0, 0, 1, 0])}
    repaired = record_stream.replace_bad_rows(batch, share=6, group=2)
    assert repaired["id"].tolist() == [2, 1, 2, 3, 2, 5]  # of the next group that has a good one: not 1 for 0, 5 for 4
    assert repaired["replaced"].tolist() == [1, 0, 0, 0, 2, 0]
    np.testing.assert_array_equal(repaired["order"], orders)
    np.testing.assert_array_equal(repaired["patches"][4], rasters[2][orders[4]])
    np.testing.assert_array_equal(repaired["patches"][[1, 2, 3, 5]], batch["patches"][[1, 2, 3, 5]])


def test_a_copy_is_of_no_picture_of_its_own_group_where_pictures_repeat():
    ids = np.tile(np.arange(6), 2)  # rows 4 to 7 show 4, 5, 0, 1
    order = np.stack([np.roll(np.arange(4), -row % 4) for row in range(12)]).astype(np.int32)
    batch = {"id": ids, "order": order, "replaced": (ids == 0).astype(np.int32)}
    repaired = record_stream.replace_bad_rows(batch, share=12, group=4)
    assert repaired["id"][0] == 4  # of row 4; its own group shows 0 to 3
    assert repaired["id"][6] == 2  # of row 2: row 10 shows 4, which row 4 has
    assert repaired["replaced"][[0, 6]].tolist() == [1, 2]
