"""Data sets in COCO's format: where tools put what, and what is said of what cannot be used."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from mae_jax.commands.inspect import report
from mae_jax.data import audit, outlines, rle
from mae_jax.data.decode import BadImage, StoredImage
from mae_jax.data.sources import coco, coco_annotations, coco_files, registry, splits
from mae_jax.errors import UserError
from mae_jax.storage import gcs as storage_gcs
from tests.helpers import coco_data
from tests.helpers.coco_data import SIZE, square


@pytest.fixture(autouse=True)
def forget_before():
    forget()


def forget():
    for cached in (coco_files.layout, coco_annotations.read, coco._files):
        cached.cache_clear()


def config(root, **fields):
    return ConfigDict({"source": "coco", "path": str(root), "train_split": "train", "val_split": "",
                       "eval_split": "val", "max_objects": 100, "crowds": "ignored", **fields})


def load(root, split="train", **fields):
    return registry.load(config(root, **fields), split)


def names(source):
    return [source.name(i) for i in range(source.size)]


def test_masks_of_a_brush_which_cvat_calls_crowds_are_objects_on_demand(tmp_path, caplog):
    coco_data.coco(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation |= {"iscrowd": 1, "attributes": {"occluded": False}}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"no image of 'train' has an object: 4 of 4 .* set data.crowds=objects"):
        load(tmp_path)
    train = load(tmp_path, crowds="objects")
    assert train.size == 2
    assert not any(train.read(i).objects.crowd.any() for i in range(2))
    assert train.read(1).objects.regions[1].values.any()
    assert not any(train.annotations.truth(i).objects.crowd.any() for i in range(2))
    assert "crowds" not in caplog.text


def test_coco_as_it_is_published(tmp_path, caplog):
    coco_data.coco(tmp_path)
    train, val = load(tmp_path), load(tmp_path, "val")
    assert "1 of 4 annotations are crowds (iscrowd=1), and not trained on" in caplog.text
    assert names(train) == ["000000000000.png", "000000000002.png"]  # the one between has no object
    assert names(val) == ["000000000007.png"]
    assert train.classes == ("cat", "dog", "kite")
    assert train.annotations.category_ids == (1, 3, 90)
    example = train.read(0)
    assert (StoredImage(example.image).height, StoredImage(example.image).width) == SIZE == example.objects.size
    assert example.objects.label.tolist() == [1, 2]
    np.testing.assert_allclose(example.objects.box, [[5, 10, 25, 30], [30.5, 4.25, 41, 14.75]])
    whole = example.objects.regions[0].whole(SIZE)
    assert whole[10:30, 5:25].all()
    assert whole.sum() == 400
    assert train.read(1).objects.crowd.tolist() == [False, True]
    truth = val.annotations.truth(0)
    assert (truth.image_id, truth.objects.area.tolist()) == (7, [144.0])


def test_a_bucket_gives_what_the_disk_gives_in_few_requests(gcs, tmp_path):
    storage_gcs.check("gs://bucket")  # as commands do before anything else: listings are not cached from here on
    local, bucket = tmp_path / "coco", epath.Path("gs://bucket/coco")
    coco_data.coco(local)
    for number in range(40):  # without annotations
        coco_data.image(local / "train2017", f"more{number}.png", number)
    for file in filter(Path.is_file, local.rglob("*")):
        (bucket / file.relative_to(local).as_posix()).write_bytes(file.read_bytes())

    def asked() -> list[str]:
        """Returns the requests since the last call; what other tests left may ask as well."""
        found, gcs.requests[:] = [request for request in gcs.requests if "coco" in request], []
        return found

    here = [(load(local, split), split) for split in ("train", "val")]
    forget()
    for source, split in here:
        asked()
        there = load(bucket, split)
        assert names(there) == names(source)
        assert there.classes == source.classes
        assert len(opening := asked()) < 40, opening
        for i in range(source.size):
            found, wanted = there.read(i), source.read(i)
            assert found.image == wanted.image
            np.testing.assert_array_equal(found.objects.box, wanted.objects.box)
        assert len(reading := asked()) == source.size, reading
    with pytest.raises(UserError, match="neither a folder nor a file"):
        load("gs://bucket/nothing")


def test_a_run_length_mask_is_read_column_by_column(tmp_path):
    coco_data.coco(tmp_path)
    crowd = load(tmp_path).read(1).objects.regions[1].whole(SIZE)
    expected = np.zeros(SIZE[0] * SIZE[1], np.uint8)
    expected[1000:1600] = 1
    np.testing.assert_array_equal(crowd, expected.reshape(SIZE[::-1]).T)


def test_what_is_empty_is_left_out_of_training_alone_and_told(tmp_path, caplog):
    coco_data.coco(tmp_path)
    load(tmp_path)
    assert "1 image of 'train' without an object, and left out of training: 000000000001.png" in caplog.text
    assert load(tmp_path, "train", train_split="val").size == 3


def in_place(root, layout):
    """Writes two images to train, and one to evaluate where the layout has a place for it, as a tool does."""
    boxes = [square(1, 1, 5, 5, 20), square(2, 2, 9, 9, 12)]
    if layout == "roboflow":
        for folder, count in (("train", 2), ("valid", 1)):
            for k in range(count):
                coco_data.image(root / folder, f"{folder}{k}.jpg", k)
            coco_data.write(root / folder / "_annotations.coco.json", {
                k + 1: f"{folder}{k}.jpg" for k in range(count)}, boxes[:count])
        return
    for k in range(2):
        folder = {"cvat_train": "images/train", "beside": "", "cvat_default": "images/default"}.get(layout, "images")
        coco_data.image(root / folder, f"train{k}.jpg", k)
    named = {1: "train0.jpg", 2: "train1.jpg"}
    if layout == "with_paths":
        named = {number: f"C:\\work\\images\\{name}" for number, name in named.items()}
    file = {"cvat_default": "annotations/instances_default.json", "cvat_train": "annotations/instances_Train.json",
            "one_per_split": "train.json"}.get(layout, "annotations.json")
    coco_data.write(root / file, named, boxes)
    if layout == "one_per_split":
        coco_data.image(root / "images", "valid0.jpg", 5)
        coco_data.write(root / "val.json", {4: "valid0.jpg"}, [square(8, 4, 1, 1, 9)])


@pytest.mark.parametrize("layout", ["roboflow", "cvat_default", "cvat_train", "labelme2coco", "beside", "with_paths",
                                    "one_per_split"])
def test_the_layouts_of_tools_are_found(tmp_path, layout):
    in_place(tmp_path, layout)
    train = load(tmp_path, "train", eval_split="")  # with nothing held out
    assert [name.rsplit("/", 1)[-1].rsplit("\\", 1)[-1] for name in names(train)] == ["train0.jpg", "train1.jpg"]
    np.testing.assert_array_equal(train.read(1).objects.box, [[9, 9, 21, 21]])
    if layout in ("roboflow", "one_per_split"):
        assert names(load(tmp_path, "val")) == ["valid0.jpg"]


def test_a_tenth_is_held_out_of_a_file_without_splits(tmp_path):
    for k in range(40):
        coco_data.image(tmp_path / "images", f"{k}.png", k)
    coco_data.write(tmp_path / "annotations.json", {k: f"{k}.png" for k in range(40)},
                    [square(k, k, 5, 5, 20) for k in range(40)])
    train, test = load(tmp_path, eval_split="test"), load(tmp_path, "test", eval_split="test")
    assert 0 < test.size < 12
    assert sorted(names(train) + names(test)) == sorted(f"{k}.png" for k in range(40))
    assert registry.same_split(config(tmp_path), "val", "test")
    assert load(tmp_path / "annotations.json", eval_split="").size == 40


def test_of_a_few_images_without_splits_one_is_held_out(tmp_path):
    few = ["0.png", "1.png", "2.png"]
    assert max(map(splits.share, few)) < 0.9  # by their hashes none would be
    for k, name in enumerate(few):
        coco_data.image(tmp_path / "images", name, k)
    coco_data.write(tmp_path / "annotations.json", dict(enumerate(few)), [square(k, k, 5, 5, 20) for k in range(3)])
    train, test = load(tmp_path, eval_split="test"), load(tmp_path, "test", eval_split="test")
    assert names(test) == [max(few, key=splits.share)]
    assert sorted(names(train) + names(test)) == few
    assert load(tmp_path, eval_split="").size == 3


def test_splits_are_joined_and_sliced_with_their_annotations(tmp_path):
    coco_data.coco(tmp_path)
    both = load(tmp_path, "train+val", train_split="train+val", eval_split="")
    assert [both.annotations.truth(i).image_id for i in range(both.size)] == [10, 12, 7]
    half = load(tmp_path, "train[50%:]", train_split="train[:50%]", val_split="train[50%:]")
    assert [half.annotations.truth(i).image_id for i in range(half.size)] == [12]
    assert half.read(0).objects.crowd.tolist() == [False, True]


def test_worker_processes_can_have_it(tmp_path):
    coco_data.coco(tmp_path)
    part = load(tmp_path)
    read, name = pickle.loads(pickle.dumps((part.read, part.name)))
    np.testing.assert_array_equal(read(0).objects.box, part.read(0).objects.box)
    assert name(1) == part.name(1)


def test_an_audit_counts_objects_and_finds_images_of_another_size(tmp_path):
    coco_data.coco(tmp_path)
    coco_data.image(tmp_path / "train2017", "000000000000.png", size=(20, 30))
    seen = audit.audit(load(tmp_path), 1, "train")
    assert seen.labels == {0: 1}  # of the other image, in which a crowd does not count
    assert "30 x 20" in seen.broken[0]
    assert "3 classes of 0 (dog) to 1 (cat) objects each" in "\n".join(report.split_lines("train", seen, (64, 64)))


def test_two_files_for_one_split_are_named(tmp_path):
    coco_data.coco(tmp_path)
    coco_data.write(tmp_path / "annotations" / "my_train.json", {}, [])
    with pytest.raises(UserError, match=r"several annotations of train: .*instances_train2017.json, .*my_train.json"):
        load(tmp_path)


BROKEN = {  # what is said → an annotation
    "image_id of no image": square(1, 99, 5, 5, 9),
    "category_id of no category": square(1, 10, 5, 5, 9, 2),
    "bbox that is not four numbers": square(1, 10, 5, 5, 9, bbox=[1, 2, None, 4]),
    "bbox of no width or height": square(1, 10, 5, 5, 9, bbox=[5, 5, 0, 9]),
    "bbox or outline outside the image": square(1, 10, 65, 5, 9),
    "outline of fewer than 3 points": square(1, 10, 5, 5, 9, segmentation=[[1, 2, 3, 4]]),
    "outline of no area": square(1, 10, 5, 5, 9, segmentation=[[1, 2, 3, 4, 5, 6]]),
    "run-length mask that does not fill its size": square(1, 10, 5, 5, 9, segmentation={
        "size": list(SIZE), "counts": [3, 4]}),
    "run-length mask of another size": square(1, 10, 5, 5, 9, segmentation={"size": [60, 40], "counts": [9, 2391]}),
    "run-length mask without size and counts": square(1, 10, 5, 5, 9, segmentation={"counts": [9, 2391]}),
    "bbox and outline that do not meet": square(1, 10, 5, 5, 9, bbox=[30, 30, 5, 5]),
    "outline with a point far outside": square(1, 10, 5, 5, 9, segmentation=[[5, 5, 1e9, 5, 14, 14, 5, 14]]),
    "run-length mask that does not fill": square(1, 10, 5, 5, 9, segmentation={
        "size": list(SIZE), "counts": [2**63 - 1, 2**63 - 1, SIZE[0] * SIZE[1] + 2]}),
    "no whole number as image_id": square(1, "10", 5, 5, 9),
    "no whole number as image_id and category_id": 17,
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_bad_annotation_is_named_in_one_line_and_left_out(tmp_path, caplog, what):
    coco_data.coco(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    coco_data.write(file, {10: "000000000000.png"}, [BROKEN[what], square(2, 10, 9, 9, 12)])
    np.testing.assert_array_equal(load(tmp_path).read(0).objects.box, [[9, 9, 21, 21]])
    line, = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"{file}: {what}")
    assert ("annotation 1" if isinstance(BROKEN[what], dict) else "annotation #0") in line
    assert "not used" in line


def test_an_unknown_category_is_named_and_an_annotation_told_once(tmp_path, caplog):
    coco_data.coco(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    coco_data.write(file, {10: "000000000000.png"}, [square(1, 99, 5, 5, 9, 2), square(2, 10, 9, 9, 12)])
    load(tmp_path)  # the first knows neither image nor category
    line, = (record.getMessage() for record in caplog.records)
    assert line.endswith("category_id of no category (1 time, not used): annotation 1 (image 99, category_id 2)")


@pytest.mark.parametrize(("annotation", "what", "box"), [
    (square(1, 10, 50, 5, 30), "bbox reaches beyond the image, and is cut", [50, 5, 60, 35]),
    (square(1, 10, 5, 5, 9, segmentation=[[5, 5, 14, 5, 14, 14, 5, 14], [1, 2, 3]]), "outline with a part that is none",
     [5, 5, 14, 14]),
    (square(1, 10, 5, 5, 9, segmentation=[]), "no outline, for which the bbox stands in", [5, 5, 14, 14]),
    (square(2, 10, 5, 5, 9), "id of several annotations", [5, 5, 14, 14])])
def test_what_is_odd_is_told_and_used(tmp_path, caplog, annotation, what, box):
    coco_data.coco(tmp_path)
    coco_data.write(tmp_path / "annotations" / "instances_train2017.json", {10: "000000000000.png"},
                    [annotation, square(2, 10, 9, 9, 12)])
    np.testing.assert_array_equal(load(tmp_path).read(0).objects.box, [box, [9, 9, 21, 21]])
    assert what in caplog.text
    assert ", used)" in caplog.text


def test_boxes_alone_have_no_masks_to_judge_by(tmp_path):
    coco_data.coco(tmp_path)
    assert load(tmp_path).annotations.masks
    coco_annotations.read.cache_clear()
    coco_data.write(tmp_path / "annotations" / "instances_train2017.json", {10: "000000000000.png"},
                    [square(1, 10, 9.5, 9, 12, segmentation=[])])
    part = load(tmp_path)
    assert not part.annotations.masks
    assert part.read(0).objects.regions[0].whole(SIZE)[9:21, 9:22].all()


def test_a_missing_file_is_named_and_left_out(tmp_path, caplog):
    coco_data.coco(tmp_path)
    (tmp_path / "train2017" / "000000000002.png").unlink()
    assert names(load(tmp_path)) == ["000000000000.png"]
    assert "missing" in caplog.text
    assert "000000000002.png" in caplog.text
    for file in (tmp_path / "train2017").iterdir():
        file.unlink()
    coco._files.cache_clear()
    with pytest.raises(UserError, match="none of the images"):
        load(tmp_path)


def test_an_image_of_more_objects_than_rows_is_told(tmp_path, caplog):
    coco_data.coco(tmp_path)
    load(tmp_path, max_objects=1)
    assert "1 image of 'train' with more than data.max_objects=1 objects" in caplog.text


@pytest.mark.parametrize(("content", "why"), [
    ("[]", "not an object"), ("{}", "no categories and no images"), ('{"images": 3}', "not a list"),
    ('{"images": [', "ends"),
    ('{"images": [{}], "annotations": [], "categories": []}', "no categories"),
    ('{"images": [{}], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "id 1"),
    ('{"images": [{}], "annotations": [{}], "categories": [{"id": 1, "name": "a"}]}', "none of its 1 annotations")])
def test_what_is_no_file_of_annotations_is_one_line(tmp_path, content, why):
    (tmp_path / "annotations.json").write_text(content)
    with pytest.raises(UserError, match=why):
        load(tmp_path)


@pytest.mark.parametrize(("categories", "why"), [
    (coco_data.CATEGORIES[:2], "'cat' is in one of them alone"),
    ([{"id": 3, "name": "cat"}, {"id": 90, "name": "kite"}, {"id": 1, "name": "dog"}], "they come in another order")])
def test_files_of_different_categories_are_refused(tmp_path, categories, why):
    coco_data.coco(tmp_path)
    coco_data.write(tmp_path / "annotations" / "instances_val2017.json", {7: "000000000007.png"},
                    [square(1, 7, 5, 5, 12, 90)], categories)
    with pytest.raises(UserError, match=f"different categories: {why}"):
        load(tmp_path, "val")


def test_a_split_that_is_not_there_is_named(tmp_path):
    coco_data.coco(tmp_path)
    with pytest.raises(UserError, match="no annotations of the split 'test'"):
        load(tmp_path, "test")
    with pytest.raises(UserError, match=r"needs data\.path"):
        load("")


def test_an_image_of_another_size_than_its_annotations_say_is_bad(tmp_path):
    from mae_jax.data.transforms import detection

    coco_data.coco(tmp_path)
    coco_data.image(tmp_path / "train2017", "000000000000.png", size=(20, 30))
    example = load(tmp_path).read(0)
    with pytest.raises(BadImage, match=r"30 x 20, .* 60 x 40"):
        detection.check_size(StoredImage(example.image), example.objects)


def test_runs_as_text_are_those_of_pycocotools():
    rows, columns = np.mgrid[:24, :31]
    disc = (columns - 14)**2 + (rows - 11)**2 < 60
    text = "`57`02N2N2N2O000000000001N2N2N2Na6"  # of pycocotools 2.0.11
    assert rle.encoded(disc) == text
    np.testing.assert_array_equal(rle.decoded(rle.runs(text, disc.shape), disc.shape), disc)


def test_runs_as_text_come_back():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        mask = rng.random(rng.integers(1, 70, 2)) < rng.random()
        mask = mask.repeat(rng.integers(1, 9), 0)
        text = rle.encoded(mask)
        np.testing.assert_array_equal(rle.decoded(rle.runs(text, mask.shape), mask.shape), mask)


@pytest.mark.parametrize("text", ["", "~", "\x00", "1", "P", "oooooooo", [1, -1], [1.5]])
def test_what_are_no_runs_is_said(text):
    with pytest.raises(ValueError, match="run"):
        rle.runs(text, (7, 9))


def test_without_pycocotools_masks_hold_the_pixels_whose_centers_are_inside(monkeypatch):
    monkeypatch.setattr(outlines, "routine", lambda: None)
    region = outlines.region([np.array([2.4, 1, 7.6, 1, 7.6, 5, 2.4, 5], np.float32)], np.array([2.4, 1, 7.6, 5]))
    expected = np.zeros((8, 10), np.uint8)
    expected[1:5, 2:8] = 1
    np.testing.assert_array_equal(region.whole((8, 10)), expected)


def test_the_file_is_read_piece_by_piece(tmp_path, monkeypatch):
    from mae_jax.runtime import bounded_json

    coco_data.coco(tmp_path)
    expected = load(tmp_path).read(0).objects.box
    for cached in (coco_files.layout, coco_annotations.read, coco._files):
        cached.cache_clear()
    monkeypatch.setattr(bounded_json, "PIECE", 11)
    np.testing.assert_array_equal(load(tmp_path).read(0).objects.box, expected)
    assert json.loads((tmp_path / "annotations" / "instances_train2017.json").read_text())["images"]
