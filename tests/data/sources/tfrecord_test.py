"""Plain TFRecord files: counted, described, and harmed in every way."""

import re

import numpy as np
import pytest
from etils import epath

from mae_jax.data import audit
from mae_jax.data.readers import record_stream
from mae_jax.data.sources import registry, tfrecord
from mae_jax.errors import UserError
from tests.helpers.records import HARM, build, config, describe, harm, plain_config, record, take, write, write_shards

FOUND = {"with one twice": "has 12 records where 11", "without a record": "has 10 records where 11",
         "emptied": "has 0 records where 11"}
FOUND |= dict.fromkeys(("cut between records", "cut in the length", "cut after the length",
                        "cut in the length's checksum"), "has 5 records where 11 are promised")
DAMAGED = "is damaged after record 5 of 11"  # what is said of all others


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path)


def test_plain_files_are_counted_and_their_labels_found(shards, caplog):
    caplog.set_level("INFO", logger="mae_jax")
    inputs = build(plain_config(shards))
    assert (inputs.num_train, inputs.parts["test"].size, inputs.classes) == (48, 7, ("0", "1", "2"))
    assert "counted 50 records in 5 files" in caplog.text


def test_without_split_names_a_tenth_is_held_out(tmp_path):
    write(tmp_path / "all.tfrecord", [record(i, label=False) for i in range(40)])
    c = config("tfrecord", tmp_path / "*.tfrecord")
    inputs = build(c)
    assert (inputs.num_train, inputs.parts["test"].size, inputs.classes) == (36, 4, ())
    assert {i for batch in inputs.evaluate() for i in batch["id"]} == {36, 37, 38, 39, -1}


def test_a_folder_with_records_json_needs_no_counting(shards, caplog):
    caplog.set_level("INFO", logger="mae_jax")
    inputs = build(describe(shards))
    assert (inputs.num_train, inputs.parts["test"].size, inputs.classes) == (48, 7, ("x", "y", "z"))
    assert "counted" not in caplog.text


def test_headers_are_counted_without_reading_the_records(shards):
    assert [tfrecord.count_records(epath.Path(shards / f"train-{i}.tfrecord")) for i in range(5)] == [3, 11, 0, 20, 16]


@pytest.mark.parametrize("what", HARM)
def test_records_lost_at_any_place_stop_the_run_and_are_all_told_by_an_audit(shards, what):
    c = describe(shards)
    harm(what, shards / "train-1.tfrecord")
    line = rf"train-1\.tfrecord {FOUND.get(what, DAMAGED)}"
    with pytest.raises(UserError, match=line):
        take(build(c).train(0), 13)
    with pytest.raises(UserError, match=line):  # on resume, in the one of two processes that reads the file
        take(build(c, np.arange(4)).train(7), 13)
    seen = audit.audit(registry.load(c.data, "train"), 2, "train")
    assert len(seen.faults) == 1
    assert re.search(line, seen.faults[0])
    lost = {"with one twice": 0, "without a record": 1, "emptied": 11}.get(what, 6)
    assert len(seen.good()) == 50 - lost
    assert not seen.broken


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("what", [what for what in HARM if "cut " in what or what == "flipped length"])
def test_without_counts_files_that_are_cut_are_refused_at_once_but_those_that_end_with_a_record(shards, what, labeled):
    if not labeled:
        for shard, size in enumerate((3, 11, 0, 20, 16)):
            write(shards / f"train-{shard}.tfrecord", [record(i, label=False) for i in range(size)])
    for shard in (1, 3):
        harm(what, shards / f"train-{shard}.tfrecord")
    if what == "cut between records":
        stream = registry.load(plain_config(shards).data, "train")
        assert (stream.size, stream.promised_by) == (3 + 5 + 0 + 5 + 16, "")
        return
    with pytest.raises(UserError, match=r"train-1\.tfrecord .*: \w.*; and 1 more of 5 files$"):
        build(plain_config(shards))


def test_an_audit_goes_on_after_each_damaged_file(shards):
    stream = registry.load(describe(shards).data, "train")
    for shard, what in ((0, "emptied"), (1, "cut in the payload"), (3, "with one twice"), (4, "flipped length")):
        if shard:
            harm(what, shards / f"train-{shard}.tfrecord")
        else:
            (shards / "train-0.tfrecord").write_bytes(b"")
    faults = []
    read = [number for number, _ in record_stream.stored(stream, faults)]
    assert [re.search(r"train-(\d)", fault)[1] for fault in faults] == ["0", "1", "3", "4"]
    assert read == [*range(3, 8), *range(14, 34), *range(34, 39)]


def test_a_record_of_something_else_stops_the_run_with_its_file(shards):
    c = describe(shards)
    write(shards / "train-1.tfrecord", [record(i) for i in range(10)] + [b"\xff\xffno example"])
    line = r"train-1\.tfrecord .* 10 of 11: .*tf\.train\.Example"
    with pytest.raises(UserError, match=line):
        take(build(c).train(0), 13)
    faults = []
    assert len(list(record_stream.stored(registry.load(c.data, "train"), faults))) == 3 + 10 + 36
    assert re.search(line, faults[0])
    (shards / "records.json").unlink()
    with pytest.raises(UserError, match=r"train-1\.tfrecord .*: .*no tf"):
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
    with pytest.raises(UserError, match=rf"1 file missing .*{names}, .*{gone}"):
        build(c)
    c.data.update(path=str(shards / gone.replace("3", "[0-2]")), eval_split="")
    assert registry.load(c.data, "train").size == 14


def test_an_empty_first_file_is_no_file_without_pictures(shards):
    write(shards / "train-0.tfrecord", [])
    assert registry.load(plain_config(shards).data, "train").counts == (0, 11, 0, 20, 16)


@pytest.mark.parametrize("content", [
    "[]", "{}", "text", '{"records": 3, "classes": []}', '{"records": {"train-0.tfrecord": "3"}, "classes": []}',
    '{"records": {"train-0.tfrecord": -3}, "classes": []}', '{"records": {}, "classes": 3}',
    '{"records": {}, "classes": [3]}'])
def test_a_damaged_records_json_is_refused_in_one_line(shards, content):
    (shards / "records.json").write_text(content)
    with pytest.raises(UserError, match=r"records\.json is damaged"):
        build(plain_config(shards))


def test_labels_are_read_although_the_first_record_has_none(shards):
    write(shards / "train-0.tfrecord", [record(0, label=False), record(1), record(2)])
    stream = registry.load(describe(shards).data, "train")
    found = {number: fields[1] for number, fields in record_stream.stored(stream)}
    assert [found[i] for i in range(4)] == [-1, 1, 2, 0]


@pytest.mark.parametrize(("path", "text"), [
    ("nothing-*", "no file matches"), ("", "no file matches"), ("*.txt", "no TFRecord")])
def test_files_that_are_not_there_are_refused(tmp_path, path, text):
    (tmp_path / "a.txt").write_text("text, longer than a header of a record would be")
    c = config("tfrecord", tmp_path / path if path else "")
    with pytest.raises(UserError, match=text):
        build(c)
