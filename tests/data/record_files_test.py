"""TFRecord files as they come: compressed, cut, of something else, or made to have TensorFlow end the process."""

import gzip
import os
import struct
import subprocess
import sys
import zlib

import pytest

from mae_jax.data import audit, record_files
from mae_jax.data.sources import registry
from mae_jax.data.tensorflow_cpu import tf
from mae_jax.errors import UserError
from tests.helpers.records import (
    assert_equal,
    assert_pixels_belong_to_ids,
    build,
    config,
    describe,
    harm,
    jpeg,
    plain_config,
    record,
    starts,
    take,
    write,
    write_shards,
)

PACK = {"GZIP": gzip.compress, "ZLIB": zlib.compress,
        "GZIP of members": lambda raw: gzip.compress(raw[:100]) + gzip.compress(raw[100:])}


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path)


def masked_crc(raw):
    """The checksum of a header, by TensorFlow's own writer: of a record of that length, or made here of any length."""
    table = list(range(256))
    for n in range(256):
        for _ in range(8):
            table[n] = table[n] >> 1 ^ (0x82F63B78 if table[n] & 1 else 0)
    crc = 2**32 - 1
    for byte in raw:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    crc ^= 2**32 - 1
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def header(length):
    raw = struct.pack("<Q", length)
    return raw + masked_crc(raw)


def test_the_checksum_of_a_header_is_that_of_tensorflow(tmp_path):
    for size in (0, 1, 35_615, 70_000):  # 35,615 begins as GZIP does
        write(tmp_path / "a", [b"x" * size])
        assert (tmp_path / "a").read_bytes()[:12] == header(size)
        assert record_files.look(tmp_path / "a") == ("", 1, size + 16, "")


@pytest.mark.slow
@pytest.mark.parametrize("how", PACK)
@pytest.mark.parametrize("described", [True, False])
def test_compressed_files_give_the_batches_of_plain_ones(shards, tmp_path_factory, how, described):
    c = describe(shards) if described else plain_config(shards)
    plain = take(build(c).train(3), 4)
    for file in shards.glob("*.tfrecord"):
        raw = PACK[how](file.read_bytes())
        file.write_bytes(raw)
    inputs = build(c)
    batches = take(inputs.train(3), 4)
    assert_equal(plain, batches)
    assert_pixels_belong_to_ids(batches[0])
    seen = audit.audit(registry.load(c.data, "train"), 2, "train")
    assert (len(seen.good()), seen.faults) == (50, [])


@pytest.mark.parametrize("length", [2**62, 2**64 - 1, 2**64 - 17, 2**40, 2000])
@pytest.mark.parametrize("at", [0, 5])
def test_a_record_that_is_said_to_go_past_the_end_of_its_file_is_named(shards, length, at):
    """Of 2^62 bytes, TensorFlow ended the process without a line."""
    file = shards / "train-1.tfrecord"
    raw = file.read_bytes()
    file.write_bytes(raw[:starts(raw)[at]] + header(length) + bytes(100))
    beyond = rf"train-1\.tfrecord .*record {at} ends {length + 16 - 112} bytes past the end"
    with pytest.raises(UserError, match=beyond):
        build(plain_config(shards))
    c = describe(shards)
    with pytest.raises(UserError, match=beyond):
        take(build(c).train(0), 13)
    seen = audit.audit(registry.load(c.data, "train"), 2, "train")
    assert len(seen.faults) == 1
    assert len(seen.good()) == 50 - 11 + at


@pytest.mark.parametrize("what", ["cut", "cut in the trailer", "flipped", "beyond", "header"])
def test_compressed_files_that_are_harmed_are_named(shards, what):
    file = shards / "train-1.tfrecord"
    raw = file.read_bytes()
    packed = gzip.compress(raw)
    at = starts(raw)[5]
    file.write_bytes({
        "cut": packed[:len(packed) // 2], "cut in the trailer": packed[:-3],
        "flipped": packed[:400] + bytes([packed[400] ^ 255]) + packed[401:],
        "beyond": gzip.compress(raw[:at] + header(2**62) + bytes(100)), "header": gzip.compress(raw[:at + 7])}[what])
    with pytest.raises(UserError, match=r"train-1\.tfrecord is cut short or damaged: \w"):
        build(plain_config(shards))
    if what == "cut in the trailer":  # the records are whole, as their own checksums say
        take(build(describe(shards)).train(0), 13)
        return
    with pytest.raises(UserError, match=r"train-1\.tfrecord (is damaged after record|has \d+ records where 11)"):
        take(build(describe(shards)).train(0), 13)


def test_a_stream_of_many_small_records_is_looked_through_in_time(tmp_path):
    raw = (header(0) + masked_crc(b"")) * 60_000
    (tmp_path / "a").write_bytes(gzip.compress(raw))
    assert record_files.look(tmp_path / "a") == ("GZIP", 60_000, 960_000, "")


def test_a_file_that_unpacks_to_gigabytes_takes_little_memory(tmp_path):
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    with open(tmp_path / "a", "wb") as file:
        file.write(packer.compress(header(2**62)))
        for _ in range(100):
            file.write(packer.compress(bytes(1_000_000)))
        file.write(packer.flush())
    assert "past the end" in record_files.look(tmp_path / "a").problem


def test_a_file_is_looked_through_once_as_long_as_it_stays(shards, monkeypatch):
    file, counted, real = shards / "train-1.tfrecord", [], record_files._plain
    monkeypatch.setattr(record_files, "_plain", lambda *args: counted.append(1) or real(*args))
    for _ in range(3):
        assert record_files.look(file).records == 11
    assert len(counted) == 1
    harm("cut in the payload", file)
    assert record_files.look(file).problem
    assert len(counted) == 2


NOT_RECORDS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n": "git lfs pull", b"<!DOCTYPE html><html>": "HTML",
    b"\x28\xb5\x2f\xfd" + bytes(20): "zstd", b"PK\x03\x04" + bytes(20): "zip", bytes(100): "zeros",
    b"text, longer than a header of a record would be": "no TFRecord", b"ab": "no TFRecord",
    b"\x89PNG\r\n\x1a\n" + bytes(10): "PNG"}


@pytest.mark.parametrize("content", NOT_RECORDS)
def test_what_is_no_file_of_records_is_told_by_what_it_is(tmp_path, content):
    (tmp_path / "a.tfrecord").write_bytes(content)
    with pytest.raises(UserError, match=NOT_RECORDS[content]):
        build(config("tfrecord", tmp_path / "*.tfrecord"))


def test_empty_files_folders_and_forbidden_files_are_named_as_such(tmp_path, monkeypatch):
    c = config("tfrecord", tmp_path / "*.tfrecord")
    (tmp_path / "a.tfrecord").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 file .*a\.tfrecord, are empty"):
        build(c)
    (tmp_path / "b.tfrecord").mkdir()
    with pytest.raises(UserError, match=r"b\.tfrecord is a folder"):
        build(c)
    (tmp_path / "b.tfrecord").rmdir()
    write(tmp_path / "a.tfrecord", [record(0)] * 20)

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(record_files, "open", forbidden, raising=False)
    with pytest.raises(UserError, match=r"cannot read .*a\.tfrecord: Permission denied"):
        build(c)


def example(**features):
    made = {}
    for key, value in features.items():
        kind = ("bytes_list", tf.train.BytesList) if isinstance(value[0], bytes) else (
            ("float_list", tf.train.FloatList) if isinstance(value[0], float) else ("int64_list", tf.train.Int64List))
        made[key] = tf.train.Feature(**{kind[0]: kind[1](value=value)})
    return tf.train.Example(features=tf.train.Features(feature=made)).SerializeToString()


@pytest.mark.parametrize(("label", "image", "line"), [
    ([1, 2], 1, r"record 5 of .*train-1\.tfrecord has 2 values in data\.label_key='label'"),
    ([0.5], 1, "record 5 .* has fractions in data.label_key"), ([b"cat"], 1, "record 5 .* has text in data.label_key"),
    ([1], 2, "record 5 .* has 2 values in data.image_key='image'")])
@pytest.mark.parametrize("described", [True, False])
def test_records_of_other_values_are_told_as_such(shards, label, image, line, described):
    records = [record(i) for i in range(11)]
    records[5] = example(image=[jpeg(5).read()] * image, label=label)
    write(shards / "train-1.tfrecord", records)
    with pytest.raises(UserError, match=line) as found:
        take(build(describe(shards) if described else plain_config(shards)).train(0), 13)
    assert "damaged" not in str(found.value)


def test_labels_that_are_text_are_told_and_the_images_read_without(tmp_path, caplog):
    write(tmp_path / "a.tfrecord", [example(image=[jpeg(i).read()], label=[b"cat"]) for i in range(40)])
    assert build(config("tfrecord", tmp_path / "*.tfrecord")).classes == ()
    assert "'label' holds text" in caplog.text


def test_a_folder_without_records_json_is_read_by_the_names_of_splits_or_told_what_to_name(shards, tmp_path_factory):
    c = config("tfrecord", shards)
    assert (build(c).num_train, build(c).parts["test"].size) == (48, 7)
    other = tmp_path_factory.mktemp("other")
    for given, said in ((), "0 files"), (("a.tfrecord", "b.tfrecord"), "2 files, such as a.tfrecord"):
        for name in given:
            write(other / name, [record(0)])
        with pytest.raises(UserError, match=rf"is a folder without records\.json; .*\{{split\}}-\*.* {said}"):
            build(config("tfrecord", other))


ABORT = """
import sys
from mae_jax.errors import UserError
from mae_jax.data.sources import registry
from tests.helpers.records import build, describe, take
from pathlib import Path
try:
    take(build(describe(Path(sys.argv[1]))).train(0), 13)
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.slow
def test_a_length_of_half_of_all_that_can_be_named_ends_no_process(shards):
    file = shards / "train-1.tfrecord"
    file.write_bytes(header(2**62) + file.read_bytes())
    done = subprocess.run([sys.executable, "-c", ABORT, str(shards)], capture_output=True, text=True, timeout=240,
                          env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 2, done.stderr
    assert "train-1.tfrecord" in done.stdout
