"""Parquet files as `datasets` writes them: columns by their metadata, random access by a copy, damage by name."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.sources import parquet, registry
from mae_jax.errors import UserError

NAMES = ["cat", "dog", "eel"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_JAX_CACHE", str(tmp_path / "cache"))
    for each in (parquet._mapped, parquet._columns):
        each.cache_clear()


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def metadata(**features) -> dict[bytes, bytes]:
    """What `datasets` 5.2 writes, of the features alone."""
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


HF = metadata(image={"_type": "Image"}, label={"names": NAMES, "_type": "ClassLabel"})


def write(path, numbers, labels=None, meta=HF, kind=IMAGE, name="image", **columns) -> None:
    path.parent.mkdir(exist_ok=True)
    images = [{"bytes": encoded(number), "path": None} if kind == IMAGE else encoded(number) for number in numbers]
    table = {name: pa.array(images, kind), **columns}
    if labels is not None:
        table["label"] = pa.array(labels)
    pq.write_table(pa.table(table).replace_schema_metadata(meta), path, row_group_size=7)


def load(path, split="train", **fields):
    data = {"source": "parquet", "path": str(path), "train_split": "train", "val_split": "", "eval_split": "test",
            "image_key": "image", "label_key": "label", "mask_key": "", "mask_offset": 0, **fields}
    return registry.load(ConfigDict(data), split)


def color(example) -> int:
    return np.asarray(Image.open(io.BytesIO(example.image)))[0, 0, 0]


def test_every_row_of_the_splits_files_is_read_at_random_with_its_label(tmp_path):
    for number in range(2):
        write(tmp_path / "data" / f"train-{number:05d}-of-00002.parquet", range(75 * number, 75 * number + 75),
              [i % 3 for i in range(75)])
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", range(20), [2] * 20)
    train, val = load(tmp_path / "data"), load(tmp_path / "data", "val")
    assert (train.size, val.size) == (150, 20)
    for i in np.random.default_rng(0).permutation(150):
        example = train.read(int(i))
        assert (color(example), example.label) == (i, i % 75 % 3)
    assert (color(val.read(5)), val.classes) == (5, tuple(NAMES))
    assert load(tmp_path / "data", "test").size == 20  # the held-out part that is there
    assert train.name(80) == "train-00001-of-00002.parquet, row 5"


@pytest.mark.parametrize(("kwargs", "fields", "classes"), [
    ({"kind": pa.binary(), "meta": {}, "name": "img"}, {"image_key": "img"}, ("0", "1", "2")),
    ({"kind": pa.large_binary(), "meta": None, "name": "picture"}, {}, ("0", "1", "2")),
    ({"meta": metadata(pixels={"_type": "Image"}), "name": "pixels", "image": pa.array(["text"] * 9)}, {},
     ("0", "1", "2")),
    ({"labels": [NAMES[i % 3] for i in range(9)]}, {}, tuple(NAMES)),
    ({"labels": [0.5] * 9, "meta": {}}, {}, ()),
    ({"labels": [float(i % 3) for i in range(9)], "meta": {}}, {}, ("0", "1", "2")),
    ({"labels": pa.array([i % 3 for i in range(9)], pa.uint64()), "meta": {}}, {}, ("0", "1", "2")),
    ({"labels": pa.array([NAMES[i % 3] for i in range(9)]).dictionary_encode(), "meta": {}}, {}, tuple(sorted(NAMES))),
    ({"labels": pa.array([i % 3 for i in range(9)]).dictionary_encode(), "meta": {}}, {}, ("0", "1", "2")),
    ({}, {"label_key": ""}, ()),
    ({"labels": None}, {}, ()),
])
def test_columns_are_found_by_name_by_metadata_and_by_type(tmp_path, kwargs, fields, classes):
    write(tmp_path / "a.parquet", range(9), **{"labels": [i % 3 for i in range(9)], **kwargs})
    source = load(tmp_path / "a.parquet", eval_split="", **fields)
    assert source.classes == classes
    assert [color(source.read(i)) for i in range(9)] == list(range(9))
    assert [source.read(i).label for i in range(9)] == [i % 3 if classes else -1 for i in range(9)]


def test_nulls_are_unlabeled_and_bad_images(tmp_path):
    images = pa.array([{"bytes": encoded(1), "path": None}, {"bytes": None, "path": "x.png"}, None], IMAGE)
    pq.write_table(pa.table({"image": images, "label": pa.array([1, None, 0])}), tmp_path / "a.parquet")
    source = load(tmp_path / "a.parquet", eval_split="")
    assert [source.label(i) for i in range(3)] == [1, -1, 0]
    assert color(source.read(0)) == 1
    for i in (1, 2):
        with pytest.raises(OSError, match="null"):
            source.read(i)


def test_a_file_is_copied_once_and_anew_when_it_changes(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", range(9))
    assert load(tmp_path / "a.parquet", eval_split="").size == 9
    copy = parquet._copy
    monkeypatch.setattr(parquet, "_copy", lambda *args: pytest.fail("copied again"))
    parquet._mapped.cache_clear()
    assert color(load(tmp_path / "a.parquet", eval_split="").read(8)) == 8
    monkeypatch.setattr(parquet, "_copy", copy)
    write(tmp_path / "a.parquet", range(20, 25))
    assert color(load(tmp_path / "a.parquet", eval_split="").read(4)) == 24


def test_masks_come_from_a_column_of_their_own(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((3, 4), 5, np.uint8)).save(buffer, "PNG")
    masks = pa.array([{"bytes": buffer.getvalue(), "path": None}] * 2, IMAGE)
    write(tmp_path / "a.parquet", range(2), annotation=masks)
    source = load(tmp_path / "a.parquet", eval_split="", mask_key="annotation")
    assert (source.read(1).mask == 5).all()
    assert color(source.read(1)) == 1


def test_held_out_texts_take_the_classes_of_the_training_files(tmp_path):
    write(tmp_path / "train-0.parquet", range(4), [NAMES[i % 2] for i in range(4)], {})
    write(tmp_path / "test-0.parquet", range(2), NAMES[1:], {})
    test = load(tmp_path / "{split}-*.parquet", "test")
    assert (test.classes, test.unknown_classes) == (("cat", "dog"), ("eel",))
    assert [test.read(i).label for i in range(2)] == [1, -1]


def cut(content: bytes) -> bytes:
    return content[:len(content) // 2]


@pytest.mark.parametrize(("change", "fields", "says"), [
    (cut, {}, r"a\.parquet is not a Parquet file, or damaged"),
    (lambda content: b"<!doctype html>" + content, {}, r"a\.parquet .*HTML"),
    (lambda content: b"", {}, r"a\.parquet is not a Parquet file"),
    (lambda content: content, {"image_key": "img"}, r"data\.image_key='img'.*known: image, label"),
    (lambda content: content, {"label_key": "lable"}, r"data\.label_key='lable'.*did you mean 'label'"),
    (lambda content: content, {"label_key": "image"}, r"data\.label_key='image'"),
    (lambda content: content, {"mask_key": "label"}, r"data\.mask_key='label'"),
])
def test_what_cannot_be_read_is_named(tmp_path, change, fields, says):
    write(tmp_path / "a.parquet", range(9), [0] * 9)
    (tmp_path / "a.parquet").write_bytes(change((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(UserError, match=says):
        load(tmp_path / "a.parquet", eval_split="", **fields)


def test_a_missing_file_is_named_by_the_names_of_the_others(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", range(9))
    with pytest.raises(UserError, match=r"1 file missing .*train-00001-of-00002\.parquet"):
        load(tmp_path / "data")


def test_files_of_other_classes_are_not_mixed(tmp_path):
    write(tmp_path / "a.parquet", range(3), [0] * 3)
    write(tmp_path / "b.parquet", range(3), [0] * 3, metadata(label={"names": ["x"], "_type": "ClassLabel"}))
    with pytest.raises(UserError, match=r"a\.parquet and .*b\.parquet"):
        load(tmp_path / "*.parquet", eval_split="")


def test_a_disk_without_room_for_the_copy_is_told_before(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", range(9))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="MAE_JAX_CACHE"):
        load(tmp_path / "a.parquet", eval_split="")
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_classes_that_a_split_numbers_otherwise_are_those_of_the_training_files_by_name(tmp_path):
    write(tmp_path / "train-0.parquet", range(6), [i % 3 for i in range(6)])
    other = metadata(label={"names": ["eel", "dog", "cat"], "_type": "ClassLabel"})
    write(tmp_path / "test-0.parquet", range(3), [0, 1, 2], other)
    test = load(tmp_path, "test")
    assert test.classes == tuple(NAMES)
    assert [test.read(i).label for i in range(3)] == [2, 1, 0]


def test_a_number_beyond_the_names_is_refused_and_a_negative_one_is_no_label(tmp_path):
    write(tmp_path / "a.parquet", range(3), [0, -100, 2])
    assert [load(tmp_path / "a.parquet", eval_split="").label(i) for i in range(3)] == [0, -1, 2]
    write(tmp_path / "b.parquet", range(3), [0, 3, 2])
    with pytest.raises(UserError, match=r"'label' has the number 3"):
        load(tmp_path / "b.parquet", eval_split="")


def test_slices_of_files_sorted_by_class_have_all_classes(tmp_path):
    write(tmp_path / "train-0.parquet", range(200), [i // 70 for i in range(200)])
    parts = [load(tmp_path, split, eval_split="") for split in ("train[:80%]", "train[80%:]")]
    assert sum(part.size for part in parts) == 200
    assert all({part.label(i) for i in range(part.size)} == {0, 1, 2} for part in parts)


def test_the_only_column_of_classes_in_the_metadata_has_the_labels(tmp_path):
    meta = metadata(image={"_type": "Image"}, labels={"names": NAMES, "_type": "ClassLabel"})
    write(tmp_path / "a.parquet", range(3), meta=meta)
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.append_column("labels", pa.array([2, 0, 1])).replace_schema_metadata(meta),
                   tmp_path / "a.parquet")
    assert [load(tmp_path / "a.parquet", eval_split="").label(i) for i in range(3)] == [2, 0, 1]


def test_a_damaged_copy_is_made_anew(tmp_path):
    write(tmp_path / "a.parquet", range(9))
    load(tmp_path / "a.parquet", eval_split="")
    copy = next((tmp_path / "cache").glob("*.arrow"))
    copy.write_bytes(copy.read_bytes()[:100])
    parquet._mapped.cache_clear()
    assert color(load(tmp_path / "a.parquet", eval_split="").read(8)) == 8


def test_a_pattern_over_several_splits_is_refused(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}-0.parquet", range(3))
    with pytest.raises(UserError, match=r"several splits, test, train.*\{split\}"):
        load(tmp_path / "*.parquet")


@pytest.mark.parametrize(("values", "says"), [
    ([0.5, 1.0], r"column 'kind' are double, such as 0\.5|are float64, such as 0\.5"),
    (pa.array([2**64 - 1, 1], pa.uint64()), "18446744073709551615 is not a class number"),
    ([float("inf"), 1.0], "inf")])
def test_numbers_of_no_class_are_refused(tmp_path, values, says):
    write(tmp_path / "a.parquet", range(2), kind=IMAGE, meta={}, kinds=pa.array(values))
    with pytest.raises(UserError, match=says.replace("'kind'", "'kinds'")):
        load(tmp_path / "a.parquet", eval_split="", label_key="kinds")


def test_bools_are_two_classes_and_nan_is_none(tmp_path):
    write(tmp_path / "a.parquet", range(3), [True, False, None], meta={})
    source = load(tmp_path / "a.parquet", eval_split="")
    assert ([source.label(i) for i in range(3)], source.classes) == ([1, 0, -1], ("0", "1"))
    write(tmp_path / "b.parquet", range(3), [1.0, float("nan"), 0.0], meta={})
    source = load(tmp_path / "b.parquet", eval_split="")
    assert [source.label(i) for i in range(3)] == [1, -1, 0]
