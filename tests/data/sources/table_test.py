"""Lists of images: which columns are taken, what is held out, and what is refused."""

import os

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.sources import registry, table
from mae_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Images 0.png to 19.png, of which the number is the color."""
    (tmp_path / "images").mkdir()
    for number in range(20):
        Image.new("RGB", (3, 2), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def write(folder, text, name="list.csv"):
    (folder / name).write_text(text)
    return folder / name


def group(path, **fields):
    return ConfigDict({"source": "table", "path": str(path), "train_split": "train", "val_split": "",
                       "eval_split": "test", "image_key": "image", "label_key": "label", "mask_key": "",
                       "mask_offset": 0, **fields})


def load(path, split="train", **fields):
    return registry.load(group(path, **fields), split)


def lines(separator, rows, *header):
    return "\n".join(separator.join(map(str, row)) for row in ((header, *rows) if header else rows)) + "\n"


def seen(source):
    """Returns name → class name, None without a label."""
    return {source.name(i): source.classes[source.read(i).label] if source.read(i).label >= 0 else None
            for i in range(source.size)}


ROWS = [(f"images/{i}.png", ("cat", "dog")[i % 2], ("train", "valid", "train", "train")[i % 4]) for i in range(20)]


@pytest.mark.parametrize(("name", "text"), [
    ("list.csv", lines(",", ROWS, "path", "label", "split")),
    ("list.tsv", lines("\t", ROWS, "File_Name", "Class", "Subset")),
    ("list.csv", "﻿" + lines(";", [(c, '"' + a + '"', b) for a, b, c in ROWS], "set", "image", "species")),
    ("list.csv", lines(",", ROWS, "path", "label", "split").replace("\n", "\r\n\r\n")),
])
def test_columns_are_found_by_their_names(folder, name, text):
    path = write(folder, text, name)
    train, test = load(path), load(path, "val")
    assert seen(train) == {f"images/{i}.png": ("cat", "dog")[i % 2] for i in range(20) if i % 4 != 1}
    assert seen(test) == {f"images/{i}.png": "dog" for i in range(1, 20, 4)}
    assert train.classes == test.classes == ("cat", "dog")
    assert np.asarray(Image.open(folder / train.name(2)))[0, 0, 0] == 3
    assert [train.label(i) for i in range(3)] == [0, 0, 1]


def test_named_columns_go_first_and_others_are_not_read(folder):
    path = write(folder, lines(",", [(f"images/{i}.png", "no.png", i % 5, "x") for i in range(20)],
                               "shot", "image", "kind", "label"))
    source = load(path, image_key="shot", label_key="kind", eval_split="")
    assert seen(source) == {f"images/{i}.png": str(i % 5) for i in range(20)}
    assert source.classes == tuple("01234")


def test_a_list_of_paths_and_numbers_without_names_as_of_caffe(folder):
    (folder / "images" / "a b.png").write_bytes((folder / "images" / "0.png").read_bytes())
    path = write(folder, "images/3.png 2\nimages/a b.png 0\nimages/5.png 1\n", "train.txt")
    assert seen(load(path, eval_split="")) == {"images/3.png": "2", "images/a b.png": "0", "images/5.png": "1"}
    path = write(folder, "images/3.png\nimages/5.png\n", "train.txt")
    assert seen(load(path, eval_split="")) == {"images/3.png": None, "images/5.png": None}


def test_a_tenth_is_held_out_where_no_column_tells(folder):
    content = (folder / "images" / "0.png").read_bytes()
    for number in range(20, 120):
        (folder / "images" / f"{number}.png").write_bytes(content)
    rows = [(f"{'./' * (number % 3)}images/{number % 120}.png", number % 2) for number in range(360)]
    path = write(folder, lines(",", rows, "path", "label"))
    parts = [load(path, split) for split in ("train", "test")]
    files = [{os.path.normpath(part.name(i)) for i in range(part.size)} for part in parts]
    assert not files[0] & files[1]  # under any spelling
    assert len(files[0] | files[1]) == 120
    assert 3 < len(files[1]) < 30
    assert parts[0].classes == parts[1].classes


def test_a_mask_is_read_from_its_column(folder):
    Image.fromarray(np.full((2, 3), 7, np.uint8)).save(folder / "mask.png")
    path = write(folder, "path,mask\nimages/3.png,mask.png\n")
    source = load(path, mask_key="mask", eval_split="")
    assert (source.read(0).mask == 7).all()


def test_labels_may_be_missing_and_left_out(folder):
    path = write(folder, "path,label\nimages/3.png,cat\nimages/4.png,\n")
    assert seen(load(path, eval_split="")) == {"images/3.png": "cat", "images/4.png": None}
    assert load(path, eval_split="", label_key="").classes == ()


def test_a_class_that_is_not_trained_on_is_known(folder):
    path = write(folder, "path,label,split\nimages/3.png,cat,train\nimages/4.png,eel,test\n")
    test = load(path, "test")
    assert (test.classes, test.unknown_classes, test.read(0).label) == (("cat",), ("eel",), -1)


@pytest.mark.parametrize(("text", "fields", "says"), [
    ("path,label\nimages/3.png,1\nimages/99.png,1\nimages/98.png,0\n", {}, r"2 files of 3 .*images/99\.png"),
    ("path,label\nimages/3.png,1\nimages/4.png\n", {}, "line 3 has 1 field"),
    ("path,label\n", {}, "has no images"),
    ("", {}, "empty"),
    ("name,age\nx,3\n", {}, "data.image_key.*name, age"),
    ("path,label\nimages/3.png,1\n", {"label_key": "lable"}, "data.label_key='lable'.*did you mean 'label'"),
    ("path,label\nimages/3.png,1\n", {"image_key": "img"}, "data.image_key='img'"),
    ("path,split\nimages/3.png,train\n", {"train_split": "fit"}, "no split 'fit'.*train"),
    ("path,label\nimages/3.png,1\n./images/3.png,2\n", {}, r"images/3\.png twice, with two labels"),
    ("path,split\nimages/3.png,train\nimages/3.png,test\n", {}, r"images/3\.png twice, with two splits"),
    ("path,label,label\nimages/3.png,1,2\n", {}, "two columns 'label'"),
    ("path,label\nhttps://a.b/3.png,1\n", {}, r"https://a\.b/3\.png"),
    ("path,label\nimages/3.png,\"1\n", {}, "cannot be|can be read|end of data"),
])
def test_what_cannot_be_meant_is_refused(folder, text, fields, says):
    path = write(folder, text)
    with pytest.raises(UserError, match=says):
        load(path, fields.get("train_split", "train"), eval_split="", **fields)


def test_bytes_that_are_no_text_are_refused(folder):
    (folder / "list.csv").write_bytes(b"path,label\n\xff\xfe,1\n")
    with pytest.raises(UserError, match="UTF-8"):
        load(folder / "list.csv")


def test_the_same_split_under_two_names_is_known_to_be_one(folder):
    path = write(folder, lines(",", ROWS, "path", "label", "split"))
    assert registry.same_split(group(path), "val", "valid")
    assert not registry.same_split(group(path), "train", "valid")


def test_the_line_of_a_run_names_the_columns(folder):
    path = write(folder, lines(",", ROWS, "path", "label", "split"))
    data = group(path)
    line = registry.describe(data, {"train_split": registry.load(data, "train")})
    assert line == ("train: 15 images in 2 classes; not read: 5 lines of valid; from list.csv by the columns "
                    "path 'path', label 'label', split 'split'")


def test_comments_and_blank_lines_count_for_nothing(folder):
    text = "# made by a script\n\n#path,label\nimages/3.png,cat\n# images/4.png is blurred\n\nimages/5.png,dog\n"
    assert seen(load(write(folder, text), eval_split="")) == {"images/3.png": "cat", "images/5.png": "dog"}
    plain = "# a list of Caffe's\nimages/3.png 1\n#\nimages/5.png 0\n"
    assert seen(load(write(folder, plain, "list.txt"), eval_split="")) == {"images/3.png": "1", "images/5.png": "0"}
    with pytest.raises(UserError, match="line 5 has 1 field"):
        load(write(folder, "# one\n\npath,label\nimages/3.png,1\nimages/4.png\n", "bad.csv"), eval_split="")


def test_an_image_whose_name_begins_as_a_comment_is_read(folder):
    (folder / "#1.png").write_bytes((folder / "images" / "1.png").read_bytes())
    assert seen(load(write(folder, "path,label\n#1.png,cat\n"), eval_split="")) == {"#1.png": "cat"}


def test_a_column_set_that_has_no_names_of_splits_is_no_column_of_splits(folder, caplog):
    rows = [(f"images/{i}.png", "cat", ("castle", "space")[i % 2]) for i in range(20)]
    source = load(write(folder, lines(",", rows, "path", "label", "set")), eval_split="")
    assert source.size == 20
    assert "'set' has no names of splits, but castle" in caplog.text
    named = write(folder, lines(",", rows, "path", "label", "set"), "named.csv")
    assert load(named, "castle", train_split="castle", eval_split="space").size == 10


def test_a_long_list_is_looked_through_once_and_what_vanishes_later_is_found_by_samples(folder, monkeypatch):
    monkeypatch.setenv("MAE_JAX_CACHE", str(folder / "cache"))
    monkeypatch.setattr(table, "SAMPLED", 5)
    path, looked = write(folder, lines(",", ROWS, "path", "label", "split")), []
    real = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda place: looked.append(str(place)) or real(place))

    def images():
        looked_at = [place for place in looked if place.endswith(".png")]
        looked.clear()
        return len(looked_at)

    load(path)
    assert images() == 15
    load(path)
    assert images() == 5
    (folder / "images" / "0.png").unlink()
    with pytest.raises(UserError, match=r"1 file of 15 that do not exist, such as images/0\.png"):
        load(path)
