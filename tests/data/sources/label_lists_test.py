"""Lists of labels beside the images of a split: which are read as such, and which files are something else."""

import pytest

from mae_jax.data.sources import label_lists, registry
from mae_jax.errors import UserError
from tests.data.sources.layouts_test import fields, labels, told, write

LISTS = {  # file → a line for image i of class c
    "val/val_annotations.txt": "{i}.png\t{c}\t0\t0\t62\t62",
    "LOC_val_solution.csv": "{i},{c} 85 1 499 272 3 4 5 6",
    "val.txt": "{i}.png {n}",
    "labels_val.csv": "{i}.png,{c}",
    "imagenet_val_synset_labels.txt": "{c}",
}


@pytest.mark.parametrize("file", LISTS)
def test_a_flat_validation_set_takes_its_labels_from_a_list(file, tmp_path):
    write(tmp_path, "train/n01/", "train/n02/", *(f"val/images/{i}.png" for i in range(6)), count=3)
    rows = [LISTS[file].format(i=i, c=f"n0{1 + i % 2}", n=i % 2) for i in range(6)]
    head = ["ImageId,PredictionString"] if file.startswith("LOC") else []
    (tmp_path / file).write_text("\n".join(head + rows) + "\n")
    assert labels(registry.load(fields(tmp_path), "test")) == {f"{i}.png": f"n0{1 + i % 2}" for i in range(6)}
    assert f"validation: 6 from val/images/, by {file.split('/')[-1]}" in told(tmp_path)


def test_numbers_of_an_unknown_order_and_other_texts_are_no_labels(tmp_path):
    write(tmp_path, "train/n01/", "train/n02/", *(f"val/{i}.png" for i in range(4)), count=2)
    (tmp_path / "val" / "readme.txt").write_text("Pictures\nof n01\nand n02\n.\n")
    assert "validation: 4 images without labels from val/" in told(tmp_path)
    (tmp_path / "val_ground_truth.txt").write_text("1\n2\n1\n2\n")
    with pytest.raises(UserError, match=r"val_ground_truth\.txt has the numbers 1 to 2"):
        registry.load(fields(tmp_path), "test")


@pytest.mark.parametrize("numbers", [(0, 1), (640, 480)])
def test_a_table_of_something_else_is_no_list_of_labels(numbers, tmp_path):
    write(tmp_path, "train/n01/", "train/n02/", *(f"val/{i}.png" for i in range(4)), count=2)
    rows = [f"{i}.png,{numbers[i % 2]}" for i in range(4)]
    (tmp_path / "val" / "metadata.csv").write_text("\n".join(["file,blurry", *rows]) + "\n")
    assert "validation: 4 images without labels from val/" in told(tmp_path)


@pytest.mark.parametrize(("file", "rows"), [
    ("sample_submission.csv", "id,label\n0,n01\n1,n02\n2,n01\n3,n02\n"),
    ("val.csv", "0,n01\n1,n01\n2,n01\n3,n01\n")])
def test_placeholders_are_no_labels(file, rows, tmp_path):
    write(tmp_path, "train/n01/", "train/n02/", *(f"val/{i}.png" for i in range(4)), count=2)
    (tmp_path / file).write_text(rows)
    assert "validation: 4 images without labels from val/" in told(tmp_path)


def test_images_that_are_not_read_are_counted_by_their_extension(tmp_path):
    write(tmp_path, "cat/", "dog/", count=20)
    for name in ("cat/1.jp2", "cat/2.JP2", "dog/x.dng", "dog/notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert "not read, by the extension: .jp2 2, .dng 1" in told(tmp_path)


def test_a_folder_without_folders_has_no_classes(tmp_path):
    write(tmp_path, "0.png", "1.png")
    with pytest.raises(UserError, match=r"data\.layout='classes': .* 2 images"):
        told(tmp_path, layout="classes")


def test_captions_beside_images_are_not_all_read_for_labels(tmp_path, monkeypatch):
    write(tmp_path, "train/n01/", "train/n02/", *(f"val/{i}.png" for i in range(80)), count=2)
    for i in range(80):
        (tmp_path / "val" / f"{i}.txt").write_text(f"{i}.png n01\n")
    (tmp_path / "val" / "val_labels.csv").write_text("\n".join(f"{i}.png,n0{1 + i % 2}" for i in range(80)))
    read = []
    of = label_lists._read
    monkeypatch.setattr(label_lists, "_read", lambda file, *args: read.append(file) or of(file, *args))
    assert labels(registry.load(fields(tmp_path), "test"))["1.png"] == "n02"
    assert {file.name for file in read} == {"val_labels.csv"}


def test_a_column_before_that_of_the_classes_is_not_taken_for_it(tmp_path):
    write(tmp_path, "train/n01/", "train/n02/", *(f"val/{i}.png" for i in range(4)), count=2)
    rows = [f"{i}.png,{i // 2},n0{1 + i % 2}\n" for i in range(4)]
    (tmp_path / "val.csv").write_text("file,crowd,class\n" + "".join(rows))
    assert labels(registry.load(fields(tmp_path), "test")) == {f"{i}.png": f"n0{1 + i % 2}" for i in range(4)}


def test_a_class_a_line_is_refused_where_the_order_of_the_images_can_be_read_in_two_ways(tmp_path):
    write(tmp_path, "train/n01/", "train/n02/", *(f"val/{i}.png" for i in range(1, 13)), count=2)
    (tmp_path / "val_labels.txt").write_text("n01\nn02\n" * 6)
    with pytest.raises(UserError, match=r"val_labels\.txt .*10\.png"):
        registry.load(fields(tmp_path), "test")
