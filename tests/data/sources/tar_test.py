"""WebDataset's tar shards: random access by an index, labels from members, and what is said of damaged shards."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.sources import registry, tar
from mae_jax.errors import UserError

CLASSES = ("cat", "dog", "eel")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_JAX_CACHE", str(tmp_path / "cache"))
    tar._kept.cache_clear()


def encoded(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (number, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write(path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def shard(path, numbers, **more) -> None:
    """Writes an image of each number; `more` is kind of a further member → its content for a number."""
    members = {}
    for number in numbers:
        members[f"{number:04d}.png"] = encoded(number)
        members |= {f"{number:04d}.{kind}": content(number) for kind, content in more.items()}
    write(path, members)


def load(path, split="train", **fields):
    data = {"source": "tar", "path": str(path), "train_split": "train", "val_split": "", "eval_split": "test",
            "image_key": "image", "label_key": "label", "mask_key": "", "mask_offset": 0, **fields}
    return registry.load(ConfigDict(data), split)


def color(example) -> int:
    return np.asarray(Image.open(io.BytesIO(example.image)))[0, 0, 0]


def test_every_image_of_the_splits_shards_is_read_at_random_with_its_label(tmp_path):
    for number in range(3):
        shard(tmp_path / "data" / f"pets-train-{number:03d}.tar", range(10 * number, 10 * number + 10),
              cls=lambda number: str(number % 3).encode())
    shard(tmp_path / "data" / "pets-val-000.tar", range(50, 54), cls=lambda number: b"1")
    train, val = load(tmp_path / "data"), load(tmp_path / "data", "validation")
    assert (train.size, val.size) == (30, 4)
    for i in np.random.default_rng(0).permutation(30):
        example = train.read(int(i))
        assert (color(example), example.label) == (i, i % 3)
        assert train.label(int(i)) == i % 3
    assert color(val.read(2)) == 52
    assert load(tmp_path / "data", "test").size == 4  # the held-out part that is there
    assert train.classes == val.classes == ("0", "1", "2")
    assert train.name(12) == "pets-train-001.tar/0012"


@pytest.mark.parametrize(("fields", "more", "classes"), [
    ({}, {"json": lambda i: json.dumps({"label": CLASSES[i % 3], "n": i % 2}).encode()}, CLASSES),
    ({"label_key": "n"}, {"json": lambda i: json.dumps({"label": CLASSES[i % 3], "n": i % 2}).encode()}, ("0", "1")),
    ({}, {"txt": lambda i: CLASSES[i % 3].encode() + b"\n"}, CLASSES),
    ({}, {"txt": lambda i: b"an image of number %d" % i}, ()),
    ({"label_key": "txt"}, {"txt": lambda i: b"a " + CLASSES[i % 3].encode()}, tuple(f"a {name}" for name in CLASSES)),
    ({"label_key": ""}, {"cls": lambda i: b"1"}, ()),
    ({}, {"cls": lambda i: CLASSES[i % 3].encode(), "json": lambda i: b'{"label": 7}'}, CLASSES),
    ({"label_key": "kind"}, {"kind": lambda i: CLASSES[i % 3].encode(), "cls": lambda i: b"0"}, CLASSES),
])
def test_labels_come_from_cls_json_or_texts_that_look_like_labels(tmp_path, fields, more, classes):
    shard(tmp_path / "a.tar", range(12), **more)
    source = load(tmp_path / "a.tar", eval_split="", **fields)
    assert source.classes == classes
    expected = [i % len(classes) if classes else -1 for i in range(12)]
    assert [source.read(i).label for i in range(12)] == expected


def test_held_out_shards_take_the_classes_of_the_training_shards_and_name_others(tmp_path):
    shard(tmp_path / "train-0.tar", range(6), cls=lambda i: CLASSES[i % 2].encode())
    shard(tmp_path / "test-0.tar", range(4), cls=lambda i: CLASSES[1 + i % 2].encode())
    test = load(tmp_path / "{split}-*.tar", "test")
    assert test.classes == CLASSES[:2]
    assert [test.read(i).label for i in range(4)] == [1, -1, 1, -1]
    assert test.unknown_classes == ("eel",)


def test_a_tenth_is_held_out_by_names_where_shards_tell_no_splits(tmp_path):
    for number in range(2):
        shard(tmp_path / f"{number}.tar", range(100))
    parts = [load(tmp_path / "{0..1}.tar", split) for split in ("train", "test")]
    names = [{part.name(i) for i in range(part.size)} for part in parts]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 200
    assert 8 < parts[1].size < 36
    alone = load(tmp_path / "1.tar", "test")
    assert {alone.name(i) for i in range(alone.size)} == {name for name in names[1] if name.startswith("1.tar/")}


def test_the_index_is_kept_and_made_anew_when_a_shard_changes(tmp_path, monkeypatch):
    shard(tmp_path / "a.tar", range(5))
    assert load(tmp_path / "a.tar", eval_split="").size == 5
    tar._kept.cache_clear()
    scan = tar._scan
    monkeypatch.setattr(tar, "_scan", lambda *args: pytest.fail("scanned again"))
    assert color(load(tmp_path / "a.tar", eval_split="").read(3)) == 3
    monkeypatch.setattr(tar, "_scan", scan)
    shard(tmp_path / "a.tar", range(10, 17))
    assert color(load(tmp_path / "a.tar", eval_split="").read(6)) == 16


def test_masks_are_members_of_their_own_and_no_image(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((3, 4), 5, np.uint8)).save(buffer, "PNG")
    write(tmp_path / "a.tar", {"x.seg.png": buffer.getvalue(), "x.png": encoded(9)})
    source = load(tmp_path / "a.tar", eval_split="", mask_key="seg.png")
    assert color(source.read(0)) == 9
    assert (source.read(0).mask == 5).all()
    assert source.fields == ("pixel_label",)


def test_keys_in_folders_and_with_further_dots_are_told_apart(tmp_path):
    write(tmp_path / "a.tar", {"./a/x.JPG": encoded(1, "JPEG"), "b/x.jpg": encoded(2, "JPEG"), "b/x.cls": b"4",
                               "c.d/y.png": encoded(3), "__MACOSX/._x": b"", "readme.txt": b"hello"})
    source = load(tmp_path / "a.tar", eval_split="")
    assert [source.name(i) for i in range(3)] == ["a.tar/a/x", "a.tar/b/x", "a.tar/c.d/y"]
    assert [source.label(i) for i in range(3)] == [-1, 4, -1]


@pytest.mark.parametrize(("damage", "says"), [
    (lambda content: content[:8 * 1024], "end marker"),
    (lambda content: content[:700], "damaged"),
    (lambda content: content[:1024] + b"\x07" * 512 + content[1536:], "byte 1024"),
    (lambda content: b"", "damaged|empty"),
    (lambda content: b"\x1f\x8b" + content[2:], "damaged|gzip"),
    (lambda content: b"<html>" + b" " * 1000, "HTML"),
])
def test_a_damaged_shard_is_named(tmp_path, damage, says):
    shard(tmp_path / "good.tar", range(8))
    content = (tmp_path / "good.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(damage(content))
    with pytest.raises(UserError, match=rf"bad\.tar .*({says})"):
        load(tmp_path / "{good,bad}.tar", eval_split="")


@pytest.mark.parametrize(("path", "fields", "says"), [
    ("none-*.tar", {}, r"none-\*\.tar"),
    ("a-{0..3}.tar", {}, r"2 files of 4 .*a-2\.tar"),
    ("a-0.tar", {"image_key": "jpg"}, r"image_key='jpg'.*\.png"),
    ("a-0.tar", {"label_key": "sort"}, r"label_key='sort'"),
    ("", {"train_split": "training"}, r"of the split 'train', only of test"),
])
def test_what_is_not_there_is_named(tmp_path, path, fields, says):
    for number in range(2):
        shard(tmp_path / "some" / f"a-{number}.tar", range(3))
    shard(tmp_path / "other" / "test-0.tar", range(3))
    where = tmp_path / "some" / path if path else tmp_path / "other"
    with pytest.raises(UserError, match=says):
        load(where, eval_split="", **fields)


def test_an_image_that_cannot_be_read_is_bad_and_nothing_else(tmp_path):
    shard(tmp_path / "a.tar", range(3))
    source = load(tmp_path / "a.tar", eval_split="")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(OSError, match=r"a\.tar"):
        source.read(1)


def test_the_line_of_a_run_says_what_was_taken(tmp_path):
    shard(tmp_path / "a.tar", range(12), cls=lambda i: b"%d" % (i % 2))
    data = ConfigDict({"source": "tar", "path": str(tmp_path / "a.tar"), "train_split": "train", "val_split": "",
                       "eval_split": "", "image_key": "image", "label_key": "label", "mask_key": ""})
    line = registry.describe(data, {"train_split": registry.load(data, "train")})
    assert line == "train: 12 images in 2 classes; from 1 shard such as a.tar, images from .png, labels from .cls"
    parts = tmp_path / "parts"
    parts.mkdir()
    for name, numbers in (("a-train-0", range(4)), ("a-train-1", range(4, 8)), ("a-val-0", range(8, 12))):
        shard(parts / f"{name}.tar", numbers)
    data.update(path=str(parts), train_split="train[:75%]", val_split="train[75%:]", eval_split="test")
    fields = ("train_split", "val_split", "eval_split")
    assert "; from 3 shards such as a-train-0.tar" in registry.describe(
        data, {field: registry.load(data, data[field]) for field in fields})


def test_a_folder_that_has_shards_in_a_sub_folder_alone_says_so(tmp_path):
    (tmp_path / "repo" / "data").mkdir(parents=True)
    (tmp_path / "repo" / ".git").mkdir()
    with pytest.raises(UserError, match=r"127}\.tar'$"):
        load(tmp_path / "repo")
    shard(tmp_path / "repo" / "data" / "a.tar", range(3))
    with pytest.raises(UserError, match=f"; there are some in {tmp_path}/repo/data$"):
        load(tmp_path / "repo")


def test_a_key_that_comes_twice_is_refused_and_not_mixed(tmp_path):
    first, second = {"x.png": encoded(1), "x.cls": b"1"}, {"x.png": encoded(2)}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for members in (first, second):
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match=r"a\.tar has x\.png twice"):
        load(tmp_path / "a.tar", eval_split="")


def test_a_mask_is_no_image_where_keys_lack_one(tmp_path):
    mask = io.BytesIO()
    Image.new("L", (4, 3), 9).save(mask, "PNG")
    write(tmp_path / "a.tar", {"x.png": encoded(1), "x.seg.png": mask.getvalue(), "y.seg.png": mask.getvalue()})
    for fields in ({}, {"mask_key": "seg.png"}):
        source = load(tmp_path / "a.tar", eval_split="", **fields)
        assert [color(source.read(i)) for i in range(source.size)] == [1]


@pytest.mark.parametrize("kinds", [("input.png", "target.png"), ("000.png", "001.png")])
def test_several_images_of_a_key_are_refused(tmp_path, kinds):
    write(tmp_path / "a.tar", {f"x.{kind}": encoded(i) for i, kind in enumerate(kinds)})
    with pytest.raises(UserError, match=rf"{kinds[0]}.*{kinds[1]}.*data\.image_key"):
        load(tmp_path / "a.tar", eval_split="")
    assert color(load(tmp_path / "a.tar", eval_split="", image_key=kinds[1]).read(0)) == 1


def test_hard_links_are_read_and_what_lies_behind_the_end_is_not_lost(tmp_path):
    shard(tmp_path / "a.tar", range(2))
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for number in range(2):
            info = tarfile.TarInfo(f"{number}.png")
            content = encoded(number)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.LNKTYPE, "1.png"
        archive.addfile(link)
    source = load(tmp_path / "b.tar", eval_split="")
    assert [color(source.read(i)) for i in range(source.size)] == [0, 1, 1]
    (tmp_path / "c.tar").write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    with pytest.raises(UserError, match=r"c\.tar .*behind the end"):
        load(tmp_path / "c.tar", eval_split="")


def test_other_shards_at_the_same_relative_path_are_not_taken_for_the_first(tmp_path, monkeypatch):
    for name, label in (("one", b"1"), ("two", b"2")):
        (tmp_path / name).mkdir()
        shard(tmp_path / name / "a.tar", range(3), cls=lambda i, label=label: label)
        os.utime(tmp_path / name / "a.tar", ns=(10**18, 10**18))
    for name, label in (("one", 1), ("two", 2)):
        monkeypatch.chdir(tmp_path / name)
        assert load("a.tar", eval_split="").label(0) == label


def test_slices_of_shards_sorted_by_class_have_all_classes(tmp_path):
    shard(tmp_path / "train-0.tar", range(200), cls=lambda i: b"%d" % (i // 70))
    parts = [load(tmp_path, split, eval_split="") for split in ("train[:80%]", "train[80%:]")]
    assert sum(part.size for part in parts) == 200
    assert all({part.label(i) for i in range(part.size)} == {0, 1, 2} for part in parts)


def test_captions_take_no_memory(tmp_path, caplog):
    shard(tmp_path / "a.tar", range(30), txt=lambda number: (f"image {number} " + "of a cat " * 20).encode())
    source = load(tmp_path / "a.tar", eval_split="")
    assert source.classes == ()
    assert "look like captions" in caplog.text
    members = tar._members(ConfigDict({"path": str(tmp_path / "a.tar"), "image_key": "image", "label_key": "label",
                                       "mask_key": ""}), "train")[1][0]
    assert members.captions.nbytes < 10
    assert load(tmp_path / "a.tar", eval_split="", label_key="txt").classes[0].startswith("image 0 of a cat")
