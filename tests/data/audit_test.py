"""What an audit sees of a folder, and the lines that are made of it."""

import shutil
import time

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.commands.inspect import report
from mae_jax.data.audit import audit, copies
from mae_jax.data.objects import Annotations, Truth, none
from mae_jax.data.sources import folder, registry
from mae_jax.data.sources.base import Example, Source
from mae_jax.runtime import progress
from tests.helpers.records import config, describe, write_shards


@pytest.fixture(autouse=True)
def fresh_listing():
    folder.folder_listing.files.cache_clear()


def save(path, size, kind="JPEG", mode="RGB", seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, kind, **options)


def lines(root, split="train", image_size=(32, 48)):
    data = ConfigDict({"source": "folder", "path": str(root), "train_split": "train", "val_split": "",
                       "eval_split": "test", "mask_key": "", "mask_offset": 0})
    seen = audit(registry.load(data, split), 2, split)
    return seen, report.split_lines(split, seen, image_size)


def test_a_folder_is_told_in_a_few_lines(tmp_path):
    cat, dog = tmp_path / "train" / "cat", tmp_path / "train" / "dog"
    for i in range(4):
        save(cat / f"{i}.jpg", (48 + i, 32 + i), seed=i)
    save(cat / "wide.jpg", (200, 31), mode="L")
    save(dog / "tall.png", (47, 300), "PNG", "RGBA")
    save(dog / "other.jpg", (60, 60), "PNG")
    (dog / "text.jpg").write_text("no image")
    shutil.copy(cat / "1.jpg", cat / "9.jpg")
    shutil.copy(cat / "1.jpg", dog / "1.jpg")
    save(tmp_path / "val" / "cat" / "a.jpg", (48, 32), seed=9)
    _, told = lines(tmp_path)
    assert told[0].startswith("train: 10 images, 1 broken; ")
    assert told[0].endswith("/s decoded in full")
    assert told[1:] == [
        "  dog/text.jpg: not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC image",
        "  labels     2 classes of 3 (dog) to 6 (cat) images each",
        "  sizes      48 x 32 to 47 x 300, median 50 x 34; 2 have a side below data.image_size=(32, 48), and are "
        "enlarged",
        "  formats    7 JPEG, 2 PNG; 1 by another extension: dog/other.jpg is PNG",
        "  converted  1 gray, 1 with transparency",
        "  copies     2 of them repeat another, byte for byte:",
        "             cat/1.jpg = cat/9.jpg = dog/1.jpg"]
    _, told = lines(tmp_path, "test")
    assert told[1:] == [
        "  labels     2 classes of 0 (dog) to 1 (cat) images each; 1 without any: dog", "  sizes      all 48 x 32",
        "  formats    1 JPEG"]


def test_copies_in_two_splits_are_a_leak_by_name(tmp_path):
    for i in range(5):
        save(tmp_path / "train" / f"{i}.png", (20, 20), "PNG", seed=i)
    for name, i in (("a", 3), ("b", 0), ("c", 3), ("e", 1)):
        (tmp_path / "val").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "train" / f"{i}.png", tmp_path / "val" / f"{name}.png")
    save(tmp_path / "val" / "d.png", (20, 20), "PNG", seed=99)
    audits = {split: lines(tmp_path, split)[0] for split in ("train", "test")}
    assert report.leak_lines(audits) == [
        "leak: 4 images of test also in train:", "  test a.png = train 3.png", "  test b.png = train 0.png",
        "  test c.png = train 3.png", "  and 1 more"]
    assert report.leak_lines({"train": audits["train"]}) == []


def test_pictures_of_the_same_bytes_and_another_shape_are_no_copies():
    shapes = [(4, 6, 3), (6, 4, 3), (4, 6, 3)]
    source = Source(3, lambda i: Example(np.arange(72, dtype=np.uint8).reshape(shapes[i])), str)
    assert copies(audit(source, 2, "train").keys())[0] == 1


def test_blank_pictures_are_told_and_are_no_copies_of_each_other():
    source = Source(4, lambda i: Example(np.full((4, 6, 3), i // 3, np.uint8)), str)
    seen = audit(source, 2, "train")
    assert report.split_lines("train", seen, (4, 6))[1:] == ["  sizes      all 6 x 4",
                                                                   "  blank      4 of one color alone"]
    assert report.leak_lines({"train": seen, "test": seen}) == []


@pytest.mark.parametrize(("size", "says"), [((4, 11), ""), ((7, 9), "; 1 have both sides below data.image_size=(8, 10)"
                                                                    ", and are enlarged")])
def test_images_with_objects_are_fitted_and_enlarged_if_both_sides_are_short(size, says):
    """An image of 12 x 4 pixels in a canvas of 10 x 8 is made smaller, although it is not as high."""
    shapes = [(*size, 3), (4, 12, 3)]
    source = Source(2, lambda i: Example(np.arange(np.prod(shapes[i]), dtype=np.uint8).reshape(shapes[i])), str,
                    annotations=Annotations(lambda i: Truth(i, none(shapes[i][:2])), ()))
    seen = audit(source, 2, "train")
    assert report.split_lines("train", seen, (8, 10))[1].endswith(says or "median 12 x 4")


def test_groups_of_copies_come_in_order():
    count, groups = copies(np.array([b"b", b"a", b"c", b"a", b"b", b"b"]))
    assert count == 3
    assert [group.tolist() for group in groups] == [[0, 4, 5], [1, 3]]
    assert copies(np.zeros(0, "S16")) == (0, [])


def test_more_than_a_few_are_summed_up():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    source = Source(300, lambda i: Example(b"" if i < 60 else pixels + i % 20), lambda i: f"p{i}")
    told = report.split_lines("train", audit(source, 2, "train"), (2, 2))
    assert told[0].startswith("train: 300 images, 60 broken; ")
    assert told[1:51] == [f"  p{i}: empty file" for i in range(50)]
    assert told[51:] == [
        "  and 10 more", "  sizes      all 2 x 2", "  copies     220 of them repeat another, pixel for pixel:",
        *(f"             p{i} = p{i + 20} = p{i + 40} and 9 more" for i in (60, 61, 62)),
        "             and 17 more groups"]


def test_labels_that_are_missing_or_no_class_are_told():
    labels = [0, 0, 1, -1, 7]
    source = Source(5, lambda i: Example(np.zeros((2, 2, 3), np.uint8), labels[i]), str, classes=("a\n", "b"))
    told = report.split_lines("train", audit(source, 1, "train"), (2, 2))
    assert told[1] == (r"  labels     2 classes of 1 (b) to 2 (a\n) images each; 1 image without a label; "
                       "1 label of no class, up to 7")


def test_several_labels_of_a_picture_are_each_counted():
    rows = np.array([[1, 1, 0], [1, 0, 0]], np.uint8)
    pixels = np.zeros((2, 2, 3), np.uint8)
    source = Source(2, lambda i: Example(pixels, labels=rows[i]), str, ("a", "b", "c"), ("labels",))
    assert audit(source, 1, "train").labels == {0: 2, 1: 1}


def test_a_mask_of_another_size_is_broken():
    source = Source(1, lambda i: Example(np.zeros((2, 3, 3), np.uint8), mask=np.zeros((3, 2), np.uint8)), str)
    assert "its mask has the shape" in audit(source, 1, "train").broken[0]


def test_records_are_told_beside_what_was_promised_and_a_slice_is_numbered_rightly(tmp_path):
    c = describe(write_shards(tmp_path))
    seen = audit(registry.load(c.data, "train[5:20]"), 2, "train")
    assert seen.name(0).endswith("train-1.tfrecord, record 2")
    assert len(seen.good()) == 15
    told = report.split_lines("train", seen, (16, 16))
    assert told[1] == "  records    15 in 5 files of 0 to 20, as records.json promises"
    path = tmp_path / "train-3.tfrecord"
    path.write_bytes(path.read_bytes()[:-10])
    seen = audit(registry.load(c.data, "train"), 2, "train")
    told = report.split_lines("train", seen, (16, 16))
    assert told[0].startswith("train: 49 images, none broken")
    assert told[1] == "  records    50 in 5 files of 0 to 20, as records.json promises; 1 not read:"
    assert told[2].endswith("train-3.tfrecord is damaged after record 19 of 20: " + told[2].split(": ")[-1])
    (tmp_path / "records.json").unlink()
    path.unlink()
    seen = audit(registry.load(config("tfrecord", tmp_path / "test-*").data, "train"), 2, "train")
    assert report.split_lines("train", seen, (16, 16))[1] == (
        "  records    6 in 1 file of 7, counted: nothing says how many there should be")


def test_a_long_audit_says_how_far_it_is(monkeypatch, caplog):
    caplog.set_level("INFO", logger="mae_jax")
    monkeypatch.setattr(progress, "TICK", 0.01)
    monkeypatch.setattr(progress, "EVERY", 0)

    def slow(number):
        time.sleep(0.1 * number)
        return Example(np.zeros((2, 2, 3), np.uint8))

    audit(Source(3, slow, str), 1, "train")
    assert "looking at train: 2 of 3 images, " in caplog.text
