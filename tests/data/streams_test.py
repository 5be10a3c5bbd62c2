"""TFRecord streams, on data sets that TFDS itself wrote and on plain files."""

import io
import itertools
import json
import re
import struct
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mae_jax import config as configs
from mae_jax import data, methods
from mae_jax.data import audit, sources, splits, streams, tfrecord
from mae_jax.data.tensorflow_cpu import tf
from mae_jax.errors import UserError

TRAIN, TEST = 61, 11


def jpeg(i):
    file = io.BytesIO()
    Image.new("RGB", (24, 24), (i, i, i)).save(file, "JPEG", quality=95)
    file.seek(0)
    return file


def store(folder, file_format, labelled=True):
    features = {"image": tfds.features.Image(encoding_format="jpeg")}
    if labelled:
        features["label"] = tfds.features.ClassLabel(names=["a", "b", "c"])
    sets = {split: [(i, {"image": jpeg(i), "label": i % 3} if labelled else {"image": jpeg(i)}) for i in range(size)]
            for split, size in (("train", TRAIN), ("test", TEST))}
    tfds.dataset_builders.store_as_tfds_dataset(
        "toy", "1.0.0", features=tfds.features.FeaturesDict(features), split_datasets=sets, data_dir=str(folder),
        file_format=file_format, disable_shuffling=True)
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return store(tmp_path_factory.mktemp("tfds"), "tfrecord")


def record(i, label=True):
    feature = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg(i).read()]))}
    if label:
        feature["label"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[i % 3]))
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def write(path, records):
    with tf.io.TFRecordWriter(str(path)) as file:
        for raw in records:
            file.write(raw)


@pytest.fixture
def shards(tmp_path):
    """Five files of 3, 11, 0, 20 and 16 records."""
    numbers = iter(range(50))
    for shard, size in enumerate((3, 11, 0, 20, 16)):
        write(tmp_path / f"train-{shard}.tfrecord", [record(next(numbers)) for _ in range(size)])
    write(tmp_path / "test-0.tfrecord", [record(i) for i in range(7)])
    return tmp_path


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
    method = methods.get("mae")(c)
    return data.build(c, method.batch_spec(), method.order(), rows)


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


def test_readers_get_the_parts_of_even_splits(stored):
    stream = sources.load(tfds_config(stored).data, "train[10%:]")
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


@pytest.mark.parametrize("parts", [((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 3, 5), (1, 2, 4, 6, 7))])
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
    assert inputs.num_eval == TEST


def test_left_over_records_are_named_and_not_counted(stored):
    inputs = build(tfds_config(stored))
    assert inputs.num_train == 60
    assert "left out by 4 readers: 1, from " in inputs.description
    assert "record 60" in inputs.description


@pytest.mark.parametrize(("fields", "text"), [
    ({"readers": 3}, "nearest: 2"), ({"readers": 0}, "nearest: 1"), ({"train_split": "train[:3]"}, "fewer than"),
    ({"train_split": "trian"}, "did you mean 'train'"), ({"image_key": "picture"}, "image")])
def test_what_cannot_be_shared_or_found_is_refused(stored, fields, text):
    with pytest.raises(UserError, match=text):
        build(tfds_config(stored, **fields))


@pytest.mark.parametrize(("fields", "text"), [
    ({"name": ""}, "needs data.name"), ({"name": "no_such_set"}, "knows no data set 'no_such_set'"),
    ({"name": "mnist"}, "not prepared"), ({"name": "kaggle:toy"}, "another catalogue, whose code")])
def test_data_sets_that_are_not_there_are_refused(stored, fields, text):
    c = tfds_config(stored)
    c.data.update(fields)
    with pytest.raises(UserError, match=text):
        build(c)


def test_array_record_has_random_access(tmp_path):
    c = tfds_config(store(tmp_path, "array_record"))
    source = sources.load(c.data, "train[10:20]")
    assert isinstance(source, sources.Source)
    assert source.size == 10
    inputs = build(c)
    batch = next(inputs.train(0))
    assert_pixels_belong_to_ids(batch)
    assert inputs.num_train == TRAIN
    assert inputs.classes == ("a", "b", "c")


def test_data_without_labels_stream_too(tmp_path):
    inputs = build(tfds_config(store(tmp_path, "tfrecord", labelled=False)))
    assert inputs.classes == ()
    assert (next(inputs.train(0))["label"] == -1).all()


def test_plain_files_are_counted_and_their_labels_found(shards, caplog):
    caplog.set_level("INFO", logger="mae_jax")
    inputs = build(plain_config(shards))
    assert (inputs.num_train, inputs.num_eval, inputs.classes) == (48, 7, ("0", "1", "2"))
    assert "counted 50 records in 5 files" in caplog.text


def test_without_split_names_a_tenth_is_held_out(tmp_path):
    write(tmp_path / "all.tfrecord", [record(i, label=False) for i in range(40)])
    c = config("tfrecord", tmp_path / "*.tfrecord")
    inputs = build(c)
    assert (inputs.num_train, inputs.num_eval, inputs.classes) == (36, 4, ())
    assert {i for batch in inputs.evaluate() for i in batch["id"]} == {36, 37, 38, 39, -1}


def test_a_folder_with_records_json_needs_no_counting(shards, caplog):
    caplog.set_level("INFO", logger="mae_jax")
    inputs = build(describe(shards))
    assert (inputs.num_train, inputs.num_eval, inputs.classes) == (48, 7, ("x", "y", "z"))
    assert "counted" not in caplog.text


def test_headers_are_counted_without_reading_the_records(shards):
    from etils import epath
    assert [tfrecord.count_records(epath.Path(shards / f"train-{i}.tfrecord")) for i in range(5)] == [3, 11, 0, 20, 16]


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
FOUND = {"with one twice": "has 12 records where 11", "without a record": "has 10 records where 11",
         "emptied": "has 0 records where 11"}
FOUND |= dict.fromkeys(("cut between records", "cut in the length", "cut after the length",
                        "cut in the length's checksum"), "has 5 records where 11 are promised")
DAMAGED = "is damaged after record 5 of 11"  # what is said of all others


def harm(what, path):
    raw = path.read_bytes()
    path.write_bytes(HARM[what](raw, *starts(raw)[5:7]))


@pytest.mark.parametrize("what", HARM)
def test_records_lost_at_any_place_stop_the_run_and_are_all_told_by_an_audit(shards, what):
    c = describe(shards)
    harm(what, shards / "train-1.tfrecord")
    line = rf"train-1\.tfrecord {FOUND.get(what, DAMAGED)}"
    for rows in (None, np.arange(4)):  # in one process, and in the one of two that reads the file
        with pytest.raises(UserError, match=line):
            take(build(c, rows).train(0), 13)
    with pytest.raises(UserError, match=line):  # on resume
        take(build(c).train(7), 13)
    seen = audit.audit(sources.load(c.data, "train"), 2, "train")
    assert len(seen.faults) == 1
    assert re.search(line, seen.faults[0])
    lost = {"with one twice": 0, "without a record": 1, "emptied": 11}.get(what, 6)
    assert len(seen.good()) == 50 - lost
    assert not seen.broken


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("what", [what for what in HARM if "cut " in what or what == "flipped length"])
def test_without_counts_files_that_are_cut_are_refused_at_once_but_those_that_end_with_a_record(shards, what, labelled):
    if not labelled:
        for shard, size in enumerate((3, 11, 0, 20, 16)):
            write(shards / f"train-{shard}.tfrecord", [record(i, label=False) for i in range(size)])
    for shard in (1, 3):
        harm(what, shards / f"train-{shard}.tfrecord")
    if what == "cut between records":
        stream = sources.load(plain_config(shards).data, "train")
        assert (stream.size, stream.promised_by) == (3 + 5 + 0 + 5 + 16, "")
        return
    with pytest.raises(UserError, match=r"train-1\.tfrecord is cut short or damaged: \w.*; and 1 more of 5 files$"):
        build(plain_config(shards))


def test_an_audit_goes_on_after_each_damaged_file(shards):
    stream = sources.load(describe(shards).data, "train")
    for shard, what in ((0, "emptied"), (1, "cut in the payload"), (3, "with one twice"), (4, "flipped length")):
        if shard:
            harm(what, shards / f"train-{shard}.tfrecord")
        else:
            (shards / "train-0.tfrecord").write_bytes(b"")
    faults = []
    read = [number for number, _ in streams.stored(stream, faults)]
    assert [re.search(r"train-(\d)", fault)[1] for fault in faults] == ["0", "1", "3", "4"]
    assert read == [*range(3, 8), *range(14, 34), *range(34, 39)]


def test_a_record_of_something_else_stops_the_run_with_its_file(shards):
    c = describe(shards)
    write(shards / "train-1.tfrecord", [record(i) for i in range(10)] + [b"\xff\xffno example"])
    line = r"train-1\.tfrecord is damaged after record 10 of 11: the next one is no tf\.train\.Example"
    with pytest.raises(UserError, match=line):
        take(build(c).train(0), 13)
    faults = []
    assert len(list(streams.stored(sources.load(c.data, "train"), faults))) == 3 + 10 + 36
    assert re.search(line, faults[0])
    (shards / "records.json").unlink()
    with pytest.raises(UserError, match=r"train-1\.tfrecord is cut short or damaged: a record is no tf"):
        build(plain_config(shards))


@pytest.mark.parametrize("names", ["records.json", "the names of the others"])
def test_a_missing_file_is_refused_but_one_that_the_pattern_leaves_out_is_not(shards, names):
    if names == "records.json":
        c = describe(shards)
    else:
        for shard in range(5):
            (shards / f"train-{shard}.tfrecord").rename(shards / f"train-{shard:05d}-of-00005.tfrecord")
        c = plain_config(shards)
    gone = "train-3.tfrecord" if names == "records.json" else "train-00003-of-00005.tfrecord"
    (shards / gone).unlink()
    with pytest.raises(UserError, match=rf"by {names}, 1 files are missing in .*, such as {gone}"):
        build(c)
    c.data.update(path=str(shards / gone.replace("3", "[0-2]")), eval_split="")
    assert sources.load(c.data, "train").size == 14


def test_an_empty_first_file_is_no_file_without_pictures(shards):
    write(shards / "train-0.tfrecord", [])
    assert sources.load(plain_config(shards).data, "train").counts == (0, 11, 0, 20, 16)


@pytest.mark.parametrize("content", [
    "[]", "{}", "text", '{"records": 3, "classes": []}', '{"records": {"train-0.tfrecord": "3"}, "classes": []}',
    '{"records": {"train-0.tfrecord": -3}, "classes": []}', '{"records": {}, "classes": 3}',
    '{"records": {}, "classes": [3]}'])
def test_a_damaged_records_json_is_refused_in_one_line(shards, content):
    (shards / "records.json").write_text(content)
    with pytest.raises(UserError, match=r"records\.json is damaged \(.*\); remove it"):
        build(plain_config(shards))


def test_labels_are_read_although_the_first_record_has_none(shards):
    write(shards / "train-0.tfrecord", [record(0, label=False), record(1), record(2)])
    found = {number: fields[1] for number, fields in streams.stored(sources.load(describe(shards).data, "train"))}
    assert [found[i] for i in range(4)] == [-1, 1, 2, 0]


def metadata(folder, name):
    return next(folder.rglob(name))


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_missing_files_of_tfds_are_refused_at_once(tmp_path, file_format):
    store(tmp_path, file_format)
    metadata(tmp_path, "toy-train.*").unlink()
    with pytest.raises(UserError, match=r"1 of the 1 files of 'train' are missing, such as .*toy-train"):
        build(tfds_config(tmp_path))


@pytest.mark.parametrize("change", [
    lambda raw: b"", lambda raw: raw[:len(raw) // 2], lambda raw: raw[:-20], lambda raw: raw[:70_000],
    lambda raw: raw[:1000] + bytes([raw[1000] ^ 1]) + raw[1001:]])
def test_damaged_files_with_random_access_give_bad_pictures_by_name(tmp_path, change):
    c = tfds_config(store(tmp_path, "array_record"))
    path = metadata(tmp_path, "toy-train.*")
    path.write_bytes(change(path.read_bytes()))
    inputs = build(c)
    batches = take(inputs.train(0), 8)
    assert sum((batch["replaced"] > 0).sum() for batch in batches) > 0
    assert all(name.startswith("toy train[") for name in inputs.bad)
    seen = audit.audit(sources.load(c.data, "train"), 2, "train")
    assert seen.broken
    assert len(seen.broken) + len(seen.good()) == TRAIN


def test_metadata_of_a_data_set_are_never_executed(tmp_path, monkeypatch):
    """TFDS imports the module of any class that features.json names, from the current folder as well."""
    store(tmp_path, "tfrecord")
    (tmp_path / "toy" / "intruder.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = metadata(tmp_path, "features.json")
    content = json.loads(file.read_text())
    content["featuresDict"]["features"]["image"]["pythonClassName"] = "toy.intruder.Image"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"asks for the class 'toy\.intruder\.Image', which is none of TFDS"):
        build(tfds_config(tmp_path))
    assert not (tmp_path / "mark").exists()


def test_metadata_of_a_data_set_do_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").mkdir()
    store(tmp_path / "outside", "tfrecord")
    store(tmp_path / "inside", "tfrecord")
    file = metadata(tmp_path / "inside", "dataset_info.json")
    file.write_text(file.read_text().replace("{DATASET}-", "../../../outside/toy/1.0.0/{DATASET}-"))
    with pytest.raises(UserError, match="lead out of its folder"):
        build(tfds_config(tmp_path / "inside"))


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


def test_a_reader_with_only_bad_pictures_gives_grey_ones():
    batch = {"id": np.arange(8), "valid": np.array([0.0] * 4 + [1.0] * 4), "replaced": np.array([1] * 4 + [0] * 4)}
    repaired = streams.repair(batch, share=4)
    assert repaired["replaced"].tolist() == [4] * 4 + [0] * 4
    assert repaired["valid"].tolist() == [0] * 4 + [1] * 4
    assert repaired["id"].tolist() == list(range(8))


def test_the_next_good_picture_is_taken_cyclically_within_three_tries():
    replaced = np.array([0, 1, 1, 1, 1, 0, 0, 1])
    batch = {"id": np.arange(8), "replaced": replaced}
    assert streams.repair(batch, share=8)["id"].tolist() == [0, 1, 5, 5, 5, 5, 6, 0]
    assert streams.repair(batch, share=8)["replaced"].tolist() == [0, 4, 3, 2, 1, 0, 0, 1]


def test_slices_of_a_stream_are_ranges_of_records(shards):
    stream = tfrecord.load(plain_config(shards).data, splits.parse("train[5:20]"))
    assert (stream.start, stream.size) == (5, 15)
    assert stream.instructions(0, 15) == [(1, 2, 9), (3, 0, 6)]
    assert stream.name(5).endswith("train-1.tfrecord, record 2")


def test_a_sum_of_streams_reads_the_files_of_both_and_not_what_a_slice_left_out(shards):
    c = plain_config(shards).data
    both, train, test = (sources.load(c, text) for text in ("train+test", "train", "test"))
    assert both.size == train.size + test.size
    assert both.instructions(0, both.size) == [
        *train.instructions(0, train.size),
        *((file + len(train.files), *part) for file, *part in test.instructions(0, test.size))]
    assert [both.name(train.size + i) for i in range(test.size)] == [test.name(i) for i in range(test.size)]
    assert sources.load(c, "train[5:]+test[:2]").size == train.size - 5 + min(2, test.size)
    for text in ("train[:5]+test", "train+test[1:]"):
        with pytest.raises(UserError, match="write for example 'train\\+validation'"):
            sources.load(c, text)


@pytest.mark.parametrize(("path", "text"), [
    ("nothing-*", "no file fits"), ("", "no file fits"), ("*.txt", "no TFRecord")])
def test_files_that_are_not_there_are_refused(tmp_path, path, text):
    (tmp_path / "a.txt").write_text("text, longer than a header of a record would be")
    c = config("tfrecord", tmp_path / path if path else "")
    with pytest.raises(UserError, match=text):
        build(c)


def test_a_copy_has_the_order_of_its_own_place_in_a_group():
    draws = np.random.default_rng(0)
    rasters = draws.integers(0, 255, (4, 6, 12), np.uint8)
    shared = draws.permutation(6)
    orders = np.stack([np.roll(shared, -3 * (row % 2)) for row in range(4)]).astype(np.int32)
    patches = np.stack([raster[order] for raster, order in zip(rasters, orders, strict=True)])
    batch = {"patches": patches, "order": orders, "id": np.arange(4), "replaced": np.array([0, 1, 0, 0])}
    repaired = streams.repair(batch, share=4, grouped=True)
    assert repaired["id"].tolist() == [0, 2, 2, 3]
    np.testing.assert_array_equal(repaired["order"], orders)
    np.testing.assert_array_equal(repaired["patches"][1], rasters[2][orders[1]])
    np.testing.assert_array_equal(repaired["patches"][[0, 2, 3]], batch["patches"][[0, 2, 3]])
