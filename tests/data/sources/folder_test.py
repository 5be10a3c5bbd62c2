import io
import os

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.decode import BadImage, decode
from mae_jax.data.sources import folder, registry
from mae_jax.errors import UserError


def picture(value, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(file, kind)
    return file.getvalue()


def write(root, *names):
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(value % 256))


@pytest.fixture(autouse=True)
def fresh_listing():
    folder.folder_listing.files.cache_clear()


def load(root, split="train", eval_split="test", masks=""):
    data = ConfigDict({"source": "folder", "path": str(root), "train_split": "train", "val_split": "",
                       "eval_split": eval_split, "mask_key": str(masks), "mask_offset": 0})
    return registry.load(data, split)


def names(source):
    return {source.name(i) for i in range(source.size)}


def test_split_folders_and_class_folders_at_any_depth_are_found(tmp_path):
    write(tmp_path, "train/cat/a.png", "train/dog/deep/b.JPG", "train/dog/c.webp", "val/dog/d.gif", "val/cat/e.bmp")
    train, held_out = load(tmp_path), load(tmp_path, "test")
    assert names(train) == {"cat/a.png", "dog/deep/b.JPG", "dog/c.webp"}
    assert names(held_out) == {"cat/e.bmp", "dog/d.gif"}
    assert train.classes == held_out.classes == ("cat", "dog")
    for source in (train, held_out):
        for i in range(source.size):
            assert source.classes[source.read(i).label] == source.name(i).split("/")[0]


def test_what_is_read_is_the_file(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(20)))
    source = load(tmp_path, eval_split="")
    for i in range(20):
        assert (decode(source.read(i).image) == int(source.name(i)[:-4])).all()


def test_class_labels_are_those_of_the_training_folder_and_others_are_named(tmp_path, caplog):
    write(tmp_path, "train/b/a.png", "train/c/a.png", "test/a/a.png", "test/c/a.png")
    held_out = load(tmp_path, "test")
    assert "1 of 2 images of 'test' are in class folders that" in caplog.text
    assert "test/a/a.png" in caplog.text
    assert [held_out.read(i).label for i in range(2)] == [-1, 1]


@pytest.mark.parametrize("files", [("a.png", "b.png"), ("x/a.png", "x/b.png"), ("a.png", "x/b.png", "x/c.png")])
def test_without_class_folders_there_are_no_labels(tmp_path, files):
    write(tmp_path, *files)
    source = load(tmp_path, eval_split="")
    assert source.classes == ()
    assert source.read(0).label == -1


def test_a_folder_without_splits_holds_out_a_tenth_by_name(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(1000)))
    train, held_out = names(load(tmp_path)), names(load(tmp_path, "test"))
    assert not train & held_out
    assert len(train | held_out) == 1000
    assert 70 < len(held_out) < 130


def test_adding_files_moves_none(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(100)))
    before = {split: names(load(tmp_path, split)) for split in ("train", "test", "train[:30%]")}
    folder.folder_listing.files.cache_clear()
    write(tmp_path, *(f"new{i}.png" for i in range(100)))
    for split, old in before.items():
        assert {name for name in names(load(tmp_path, split)) if not name.startswith("new")} == old


def test_slices_of_a_split_are_disjoint_and_complete(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(300)))
    one, two = names(load(tmp_path, "train[:20%]")), names(load(tmp_path, "train[20%:]"))
    assert not one & two
    assert one | two == names(load(tmp_path))
    assert 30 < len(one) < 80


def test_without_an_evaluation_split_nothing_is_held_out(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(50)))
    assert load(tmp_path, eval_split="").size == 50


def test_a_lone_train_folder_is_the_whole(tmp_path):
    write(tmp_path, *(f"train/{c}/{i}.png" for c in "ab" for i in range(100)))
    assert load(tmp_path).classes == ("a", "b")
    assert load(tmp_path).size + load(tmp_path, "test").size == 200


def test_a_class_that_is_called_train_is_a_class(tmp_path):
    write(tmp_path, "bus/a.png", "car/a.png", "train/a.png")
    assert load(tmp_path, eval_split="").classes == ("bus", "car", "train")


def test_hidden_files_are_left_out(tmp_path):
    write(tmp_path, "a.png", ".b.png", ".cache/c.png")
    assert names(load(tmp_path, eval_split="")) == {"a.png"}


def test_links_are_followed_to_files_and_folders_and_those_that_lead_out_are_told(tmp_path, caplog):
    write(tmp_path, "in/cat/a.png", "out/d.png", "out/deep/f.png")
    os.symlink(tmp_path / "out" / "d.png", tmp_path / "in" / "cat" / "d.png")
    os.symlink(tmp_path / "out", tmp_path / "in" / "dog")
    os.symlink(tmp_path / "in" / "cat" / "a.png", tmp_path / "in" / "cat" / "e.png")
    os.symlink(tmp_path / "in", tmp_path / "link")
    source = load(tmp_path / "link", eval_split="")
    assert names(source) == {"cat/a.png", "cat/d.png", "cat/e.png", "dog/d.png", "dog/deep/f.png"}
    assert source.classes == ("cat", "dog")
    assert all(decode(source.read(i).image).shape == (4, 4, 3) for i in range(source.size))
    assert "2 links out of the folder followed, such as dog" in caplog.text


def test_loops_of_links_end_and_no_folder_is_read_twice(tmp_path, caplog):
    write(tmp_path, "in/one/a.png", "in/sub/b.png", "out/c.png")
    for link, target in (("in/self", "in/self"), ("in/up", "in"), ("in/above", "."), ("in/twin", "in/sub"),
                         ("in/far", "out"), ("in/far2", "out"), ("out/back", "in"), ("out/round", "out")):
        os.symlink(tmp_path / target, tmp_path / link)
    assert names(load(tmp_path / "in", eval_split="")) == {"one/a.png", "sub/b.png", "far/c.png"}
    assert "6 links left out, to a folder that is read already, such as above" in caplog.text


def test_a_link_to_nothing_is_a_broken_picture_by_name(tmp_path):
    write(tmp_path, "a.png")
    os.symlink(tmp_path / "gone.png", tmp_path / "b.png")
    os.symlink(tmp_path / "c.png", tmp_path / "c.png")
    source = load(tmp_path, eval_split="")
    assert names(source) == {"a.png", "b.png", "c.png"}
    for i in (1, 2):
        with pytest.raises(OSError, match=source.name(i)):
            source.read(i)


def test_what_is_no_regular_file_is_left_out_and_does_not_hang(tmp_path, caplog):
    write(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    os.symlink("/dev/zero", tmp_path / "c.png")
    assert names(load(tmp_path, eval_split="")) == {"a.png"}
    assert "2 files left out, no regular one, such as b.png" in caplog.text


def test_a_folder_that_cannot_be_listed_is_an_error_and_no_silent_loss(tmp_path, monkeypatch):
    write(tmp_path, "a/a.png", "b/b.png")

    def scandir(path, listed=os.scandir):
        if str(path).rstrip("/").endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match=r"Permission denied.*/b"):
        load(tmp_path)


def test_names_that_are_no_text_are_read_and_printed_escaped(tmp_path):
    for name in (b"caf\xe9.png", b"two\nlines.png"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(picture(7))
    source = load(tmp_path, eval_split="")
    assert names(source) == {r"caf\udce9.png", r"two\nlines.png"}
    assert all((decode(source.read(i).image) == 7).all() for i in range(2))


def unread(root, *expressions):
    return folder.unread(ConfigDict({"path": str(root)}), expressions)


def test_what_lies_in_no_split_or_is_no_picture_is_told(tmp_path):
    write(tmp_path, "train/cat/a.png", "train/dog/a.png", "val/cat/a.png", "spare/b.png", "c.png", ".hidden.png")
    (tmp_path / "train" / "cat" / "notes.TXT").touch()
    (tmp_path / "train" / "raw").touch()
    told = ["2 files not read, because the extension is not that of an image (.txt 1, none 1), "
            "such as train/cat/notes.TXT"]
    assert unread(tmp_path, "train", "test") == [
        "2 images in no split of the config, such as spare/b.png", *told]
    assert unread(tmp_path, "train[:50%]")[0] == "3 images in no split of the config, such as spare/b.png"
    folder.folder_listing.files.cache_clear()
    write(tmp_path / "flat", "a.png", "x/b.png")
    assert unread(tmp_path / "flat", "train", "test") == []
    write(tmp_path / "lone", "train/a.png", "b.png")
    assert unread(tmp_path / "lone", "train") == ["1 image in no split of the config, such as b.png"]


@pytest.mark.parametrize(("files", "path", "text"), [
    ((), "nowhere", "is not a folder"), ((), "", "is empty"),
    (("a.txt", "b.md"), "", r"2 other files, such as a\.txt")])
def test_a_folder_without_pictures_says_what_is_there(tmp_path, files, path, text):
    write(tmp_path, *files)
    with pytest.raises(UserError, match=text):
        load(tmp_path / path)


@pytest.mark.parametrize(("split", "text"), [("trian", "'trian'.* 'train'"), ("train[:500]", r"train\[:10%\]")])
def test_splits_that_a_folder_cannot_have_are_refused(tmp_path, split, text):
    write(tmp_path, "a.png")
    with pytest.raises(UserError, match=text):
        load(tmp_path, split)


def test_a_split_without_pictures_is_refused(tmp_path):
    write(tmp_path, "a.png")
    with pytest.raises(UserError, match="has no images"):
        [load(tmp_path, split) for split in ("train", "test")]


def test_a_file_that_vanished_is_an_error_of_the_file(tmp_path):
    write(tmp_path, "a.png", "b.png")
    source = load(tmp_path, eval_split="")
    (tmp_path / "a.png").unlink()
    with pytest.raises(OSError, match=r"a\.png"):
        source.read(0)


def test_an_unlabeled_share_is_even():
    shares = [folder.splits.share(f"folder/{i:06d}.jpg") for i in range(2000)]
    assert abs(np.mean(shares) - 0.5) < 0.03
    assert 0 <= min(shares) < max(shares) < 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_lie_in_a_folder_of_the_same_shape(tmp_path, split):
    for part in ("train", "val"):
        for kind, (extension, value) in {"pictures": ("jpg", 7), "masks": ("png", 2)}.items():
            path = tmp_path / kind / part / "a" / f"b.{extension}"
            path.parent.mkdir(parents=True)
            Image.new("L", (3, 2), value + (part == "val")).save(path)
    source = load(tmp_path / "pictures", split, masks=tmp_path / "masks")
    assert source.fields == ("pixel_label",)
    assert source.read(0).mask.tolist() == [[2 + (split == "val")] * 3] * 2


def test_a_folder_without_masks_is_refused(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("L", (3, 2)).save(tmp_path / "pictures" / "b.jpg")
    with pytest.raises(UserError, match=r"mask for b\.jpg.*b\.png"):
        load(tmp_path / "pictures", masks=tmp_path / "masks")


def test_a_mask_that_is_missing_is_told_by_its_path(tmp_path):
    for file in ("pictures/train/a.jpg", "pictures/train/b.jpg", "masks/train/a.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (3, 2)).save(tmp_path / file)
    source = load(tmp_path / "pictures", eval_split="", masks=tmp_path / "masks")
    with pytest.raises(BadImage, match=r"its mask does not exist: .*masks/train/b\.png"):
        [source.read(i) for i in range(source.size)]


@pytest.mark.parametrize(("name", "source"), [("list.csv", "table"), ("shard.tar", "tar"), ("x.parquet", "parquet")])
def test_a_file_of_another_source_is_told_which_one_reads_it(tmp_path, name, source):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}.*data\.source={source}"):
        load(tmp_path / name)
