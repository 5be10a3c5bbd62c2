"""How folders are recognized: each as a person has it, the line that says what was taken, and what is refused."""

import unicodedata

import numpy as np
import pytest
from PIL import Image

from mae_jax import config as configs
from mae_jax import data
from mae_jax.data.labels import check as check_labels
from mae_jax.data.sources import folder, registry, splits
from mae_jax.errors import UserError
from tests.config.config_test import RECIPES, recipe
from tests.helpers.tiny import tiny_config

AUTO = configs.recipe_version.CURRENT


@pytest.fixture(autouse=True)
def _fresh_listing():
    folder.folder_listing.files.cache_clear()


def write(root, *names, count=1):
    """Writes small images; a name that ends in '/' is a folder of `count` of them."""
    for name in names:
        files = [f"{name}{i}.png" for i in range(count)] if name.endswith("/") else [name]
        for file in files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (len(file),) * 3).save(root / file)


def fields(root, version=AUTO, **changes):
    """Returns the group `data` of a config for the folder, as a run resolves it."""
    given = {f"data.{key}": value for key, value in changes.items()}
    config = tiny_config({"data.source": "folder", "data.path": str(root), "recipe_version": version, **given})
    return configs.for_platform(config, "cpu").data


def told(root, **changes):
    return data.OpenedData(configs.for_platform(tiny_config(
        {"data.source": "folder", "data.path": str(root)} | {f"data.{k}": v for k, v in changes.items()}), "cpu")
    )._describe()


def names(source):
    return {source.name(i) for i in range(source.size)}


def labels(source):
    """Returns name → class name, None without a label."""
    found = ((source.name(i), source.read(i).label) for i in range(source.size))
    return {name: source.classes[label] if label >= 0 else None for name, label in found}


@pytest.mark.parametrize(("train", "held", "called"), [
    ("train", "valid", "validation"), ("Training", "Validation", "validation"), ("TRAIN", "dev", "validation"),
    ("train2017", "val2017", "validation"), ("training_set", "test_set", "test"), ("trainset", "testset", "test"),
    ("ILSVRC2012_img_train", "ILSVRC2012_img_val", "validation"), ("images_train", "images-test", "test"),
    ("seg_train/seg_train", "seg_test/seg_test", "test"), ("train/images", "eval/images", "test"),
    ("photos/train", "photos/testing", "test"), ("a/b/Train", "a/b/Test", "test"), ("trainval", "test", "test"),
    ("01_train", "02_held-out", "test")])
def test_split_folders_are_known_by_their_usual_names(train, held, called, tmp_path):
    write(tmp_path, *(f"{train}/{name}/" for name in ("cat", "dog")), count=3)
    write(tmp_path, *(f"{held}/{name}/" for name in ("dog", "cat")), count=2)
    found = {name: registry.load(fields(tmp_path), name) for name in ("train", "test")}
    assert [found[name].classes for name in found] == [("cat", "dog")] * 2
    assert [found[name].size for name in found] == [6, 4]
    for source in found.values():
        assert all(name.split("/")[0] == label for name, label in labels(source).items())
    assert told(tmp_path) == f"train: 6 images in 2 classes (cat, dog) from {train}/; {called}: 4 from {held}/"


@pytest.mark.parametrize(("name", "role"), [
    ("VALID", "val"), ("test-images", "test"), ("my_train_data", "train"), ("hold_out", "test"), ("val_01", "val"),
    ("cat", ""), ("training shoes", ""), ("test tube", ""), ("train_masks", ""), ("images", ""), ("latest", ""),
    ("contest", ""), ("evaluations", "")])
def test_the_role_of_a_name(name, role):
    assert splits.role(name) == role


def test_three_splits_are_told_with_what_is_not_read(tmp_path):
    write(tmp_path, "Train/a/", "Train/b/", "Val/a/", "Val/b/", "Test/a/", "Test/b/", "unlabeled/", count=2)
    assert told(tmp_path) == ("train: 4 images in 2 classes (a, b) from Train/; test: 4 from Test/; "
                              "not read: Val/, unlabeled/")
    assert told(tmp_path, val_split="dev") == (
        "train: 4 images in 2 classes (a, b) from Train/; validation: 4 from Val/; test: 4 from Test/; "
        "not read: unlabeled/")
    assert told(tmp_path, train_split="train[:50%]", eval_split="").startswith("train: ")
    assert "from Train/ [:50%]" in told(tmp_path, train_split="train[:50%]", eval_split="")


def test_classes_that_hold_the_splits(tmp_path):
    write(tmp_path, *(f"{name}/{split}/" for name in ("cat", "dog") for split in ("train", "Test")), count=2)
    found = {name: labels(registry.load(fields(tmp_path), name)) for name in ("train", "test")}
    assert set(found["train"].items()) == {(f"{name}/train/{i}.png", name) for name in ("cat", "dog") for i in (0, 1)}
    assert set(found["test"].items()) == {(f"{name}/Test/{i}.png", name) for name in ("cat", "dog") for i in (0, 1)}
    assert told(tmp_path) == ("train: 4 images in 2 classes (cat, dog) from the folders train/ of the classes; "
                              "test: 4 from the folders Test/ of the classes")


def test_folders_without_splits_are_told(tmp_path):
    write(tmp_path / "of", "cat/", "dog/", count=50)
    sizes = [registry.load(fields(tmp_path / "of"), name).size for name in ("train", "test")]
    assert told(tmp_path / "of") == (
        f"train: {sizes[0]} images in 2 classes (cat, dog) from the class folders; test: {sizes[1]} from the class "
        "folders, held out by a hash of the names")
    write(tmp_path / "flat", "a/", count=30)
    assert told(tmp_path / "flat", eval_split="") == "train: 30 images without classes from a/"
    folder.folder_listing.files.cache_clear()
    assert told(tmp_path, layout="flat", eval_split="") == "train: 130 images without classes from the folder"


def test_one_wrapping_folder_of_classes_is_gone_through(tmp_path):
    write(tmp_path, "archive/data/cat/", "archive/data/dog/", "__MACOSX/archive/", count=20)
    assert registry.load(fields(tmp_path), "train").classes == ("cat", "dog")
    assert "from archive/data/" in told(tmp_path)


@pytest.mark.parametrize(("files", "readings"), [
    (("cat/", "dog/", "test/"), ["test/ is held out from the classes cat/, dog/", "layout=classes"]),
    (("train/", "extra/"), ["train/ is trained on, and extra/ not read", "layout=splits", "layout=classes"]),
    (("train/a/", "train/b/", "bus/", "car/"), ["layout=splits", "bus/, car/", "layout=classes"]),
    (("val/a/", "val/b/"), ["without a folder to train on", "val", "layout=classes"]),
    (("val/", "test/"), ["without a folder to train on", "layout=classes"]),
    (("val/", "0.png", "1.png"), ["held out from the 2 images beside it", "layout=flat"]),
    (("one/train/a/", "one/val/a/", "two/train/b/", "two/val/b/"), ["data.path=", "one", "layout=classes"]),
    (("one/train/", "one/val/", "cat/"), ["one/ with folders of splits", "layout=classes"]),
    (("JPEGImages/", "SegmentationClass/"), ["data.path=", "JPEGImages", "layout=classes"]),
    (("train/", "train/a/", "extra/"), ["extra/ not read", "layout=splits"]),
    (("images/train/", "images/val/", "masks/train/", "masks/val/"), ["data.path=", "images", "layout=classes"]),
    (("trainA/", "trainB/", "testA/", "testB/"), ["trainA/, trainB/ are trained on", "layout=classes"]),
    (("fold1/a/", "fold1/b/", "fold2/a/", "fold2/b/"),
     ["a/, b/ are classes, in each of fold1/, fold2/", "layout=classes"]),
    (("train/images/", "train/masks/", "val/images/", "val/masks/"), ["data.path=", "images", "layout=classes"]),
], ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_two_readings_are_refused_with_both_and_the_flag(files, readings, tmp_path):
    write(tmp_path, *files, count=3)
    with pytest.raises(UserError, match="two ways") as error:
        registry.load(fields(tmp_path), "train")
    assert all(text in str(error.value) for text in readings)


def test_layouts_of_well_known_data_sets(tmp_path):
    kaggle = tmp_path / "kaggle"
    inner = "ILSVRC/Data/CLS-LOC"
    write(kaggle, f"{inner}/train/n01/", f"{inner}/train/n02/", f"{inner}/val/v1.png", f"{inner}/test/", count=3)
    (kaggle / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nv1,n02 1 2 3 4\n")
    (kaggle / "ILSVRC" / "Annotations" / "CLS-LOC").mkdir(parents=True)
    (kaggle / "ILSVRC" / "Annotations" / "CLS-LOC" / "a.xml").touch()
    assert labels(registry.load(fields(kaggle), "val")) == {"v1.png": "n02"}
    assert labels(registry.load(fields(kaggle), "test")) == {f"{i}.png": None for i in range(3)}
    yolo = tmp_path / "yolo"
    write(yolo, "images/train/", "images/val/", count=3)
    (yolo / "labels" / "train").mkdir(parents=True)
    (yolo / "labels" / "train" / "0.txt").write_text("0 1 1 1 1\n")
    assert told(yolo).startswith("train: 3 images without classes from images/train/; validation: 3 from images/val/")
    write(tmp_path / "anomalies", "train/good/", "test/good/", "test/broken/", count=2)
    assert told(tmp_path / "anomalies") == "train: 2 images without classes from train/good/; test: 4 from test/"
    write(tmp_path / "held", "eval_2020/train/a/", "eval_2020/train/b/", "eval_2020/val/b/", count=2)
    assert registry.load(fields(tmp_path / "held"), "train").classes == ("a", "b")


def test_what_lies_beside_split_folders_or_wrapping_ones_is_told(tmp_path):
    write(tmp_path, "logo.png", "in/train/a/", "in/train/b/", "in/val/a/", "in/val/b/", "in/x.png", count=2)
    assert told(tmp_path).endswith("validation: 4 from in/val/; not read: in/x.png, logo.png")


def test_the_flag_decides(tmp_path):
    write(tmp_path / "one", "cat/", "dog/", "test/", count=5)
    assert registry.load(fields(tmp_path / "one", layout="classes"), "train").classes == ("cat", "dog", "test")
    write(tmp_path / "two", "train/a/", "train/b/", "bus/", count=20)
    assert registry.load(fields(tmp_path / "two", layout="splits"), "train").classes == ("a", "b")
    assert registry.load(fields(tmp_path / "two", layout="classes"), "train").classes == ("bus", "train")
    assert registry.load(fields(tmp_path / "two", layout="flat"), "train").classes == ()
    with pytest.raises(UserError, match=r"layout='splits'.*no folder with a usual name"):
        registry.load(fields(tmp_path / "two" / "train", layout="splits"), "train")


def test_two_folders_that_may_be_the_same_split_are_asked_about(tmp_path):
    write(tmp_path, "train/a/", "train/b/", "val/a/", "Valid/b/", count=2)
    with pytest.raises(UserError, match=r"eval_split=Valid or --config\.data\.eval_split=val"):
        registry.load(fields(tmp_path), "test")
    assert names(registry.load(fields(tmp_path, eval_split="valid"), "valid")) == {"b/0.png", "b/1.png"}
    assert names(registry.load(fields(tmp_path, eval_split="val"), "val")) == {"a/0.png", "a/1.png"}


def test_a_stray_image_beside_class_folders_is_named_and_left_out(tmp_path):
    write(tmp_path, "cat/", "dog/", "preview.png", count=20)
    source = registry.load(fields(tmp_path, eval_split=""), "train")
    assert source.classes == ("cat", "dog")
    assert "preview.png" not in names(source)
    assert source.size == 40
    assert "left out, beside the class folders: 1 image, such as preview.png" in told(tmp_path)
    folder.folder_listing.files.cache_clear()
    write(tmp_path / "split", "train/cat/", "train/dog/", "train/x.png", "val/cat/", "val/dog/", "val/y.png", count=3)
    assert registry.load(fields(tmp_path / "split"), "train").classes == ("cat", "dog")
    assert told(tmp_path / "split").endswith("2 images, such as train/x.png")


def test_many_images_beside_folders_are_asked_about(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(15)), "trip/", "home/", count=10)
    with pytest.raises(UserError, match=r"the 15 beside them.*layout=classes.*layout=flat"):
        registry.load(fields(tmp_path), "train")
    found = {how: registry.load(fields(tmp_path, layout=how, eval_split=""), "train") for how in ("classes", "flat")}
    assert {how: (source.size, source.classes) for how, source in found.items()} == {
        "classes": (20, ("home", "trip")), "flat": (35, ())}


def test_droppings_are_ignored_and_counted(tmp_path):
    write(tmp_path, "cat/", "dog/", "@eaDir/", "cat/@eaDir/", "#recycle/", "lost+found/", ".AppleDouble/",
          "__MACOSX/cat/", "dog/.ipynb_checkpoints/", "$RECYCLE.BIN/", "System Volume Information/", "dog/._0.png",
          "cat/.thumbnails/", count=4)
    (tmp_path / "cat" / "Thumbs.db").touch()
    (tmp_path / "desktop.ini").touch()
    source = registry.load(fields(tmp_path, eval_split=""), "train")
    assert source.classes == ("cat", "dog")
    assert names(source) == {f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)}
    line = told(tmp_path, eval_split="")
    assert "ignored, of file servers and viewers: @eaDir 2" in line
    assert folder.unread(fields(tmp_path), ["train"]) == []


def test_droppings_do_not_stand_beside_split_folders_as_data(tmp_path):
    write(tmp_path, "train/", "val/", "@eaDir/", "train/@eaDir/", count=4)
    assert told(tmp_path) == ("train: 4 images without classes from train/; validation: 4 from val/; ignored, of file "
                              "servers and viewers: @eaDir 1")


def test_names_compare_in_nfc(tmp_path):
    composed, apart = "caf\N{LATIN SMALL LETTER E WITH ACUTE}", unicodedata.normalize("NFD", "caf\u00e9")
    assert composed != apart
    write(tmp_path, f"train/{composed}/", "train/b/", f"val/{apart}/", "val/b/", count=2)
    train, held = (registry.load(fields(tmp_path), name) for name in ("train", "test"))
    assert train.classes == held.classes == ("b", composed)
    assert set(labels(held).values()) == {"b", composed}
    one, other = (tmp_path / name for name in ("one", "other"))
    for root, name in ((one, composed), (other, apart)):
        write(root, *(f"{name}{i}.png" for i in range(40)))
    assert len({registry.load(fields(root), "train").digest() for root in (one, other)}) == 1
    kept = registry.load(fields(tmp_path / "train", classes=apart, eval_split=""), "train")
    assert kept.classes == (composed,)


def test_classes_that_data_classes_leaves_out_need_not_be_trained_on(tmp_path):
    write(tmp_path, "train/cat/", "train/dog/", "valid/cat/", "valid/dog/", "valid/wolf/", count=2)
    opened = finetune(tmp_path, classes="cat,dog")
    check_labels(opened.config.data, {"train_split": opened.train, "eval_split": opened.eval})
    assert opened.eval.size == 4


def finetune(root, **changes):
    given = {f"data.{key}": value for key, value in changes.items()}
    return data.OpenedData(configs.for_platform(tiny_config(
        {"data.source": "folder", "data.path": str(root), **given}, "supervised"), "cpu"))


def test_a_classifier_is_refused_where_the_evaluation_has_no_label_or_other_classes(tmp_path):
    write(tmp_path / "flat", "train/cat/", "train/dog/", "val/", count=3)
    with pytest.raises(UserError, match=r"eval_split='test' has no image with a label.*cat, dog.*eval\.test=False"):
        finetune(tmp_path / "flat").check_labels()
    write(tmp_path / "other", "train/cat/", "train/dog/", "val/Katze/", "val/dog/", count=3)
    with pytest.raises(UserError, match=r"eval_split='test' has classes .*: Katze; .*'train' are cat, dog"):
        finetune(tmp_path / "other").check_labels()
    finetune(tmp_path / "other", eval_split="").check_labels()


def test_a_held_out_part_that_lacks_a_class_is_told(tmp_path, caplog):
    write(tmp_path, "train/cat/", "train/dog/", "val/dog/", count=3)
    finetune(tmp_path).check_labels()
    assert "data.eval_split='test' has no image of 1 of the 2 classes: cat" in caplog.text


def test_arrays_without_labels_of_the_test_part_are_refused(tmp_path):
    pixels = np.zeros((6, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=pixels, y_train=np.arange(6) % 3, x_test=pixels)
    with pytest.raises(UserError, match=r"eval_split='test' has no image with a label"):
        finetune(tmp_path / "a.npz", source="npz").check_labels()
    np.savez(tmp_path / "b.npz", x_train=pixels, y_train=np.arange(6) % 3, x_test=pixels, y_test=np.full(6, -1))
    with pytest.raises(UserError, match=r"eval_split='test' has no image with a label"):
        finetune(tmp_path / "b.npz", source="npz").check_labels()


def test_a_stored_run_of_the_first_version_reads_folders_and_numbers_as_it_did(tmp_path):
    write(tmp_path, "train/cat/", "train/dog/", "valid/cat/", "stray.png", "@eaDir/", count=12)
    first, now = fields(tmp_path, version=1), fields(tmp_path)
    assert (first.layout, now.layout) == ("0.1.0", "auto")
    assert registry.load(now, "train").classes == ("cat", "dog")
    assert registry.load(first, "train").classes == ()
    assert registry.load(first, "train").size + registry.load(first, "test").size == 12 * 4 + 1
    (tmp_path / "stray.png").unlink()
    folder.folder_listing.files.cache_clear()
    assert registry.load(first, "train").classes == ("@eaDir", "train", "valid")
    numbered = tmp_path / "numbered"
    write(numbered, *(f"{i}/" for i in range(12)), count=2)
    kept = {version: registry.load(fields(numbered, version, classes="10-11", eval_split=""), "train").classes
            for version in (1, AUTO)}
    assert kept == {1: ("8", "9"), AUTO: ("10", "11")}


def test_a_stored_config_goes_on_with_its_reading(tmp_path):
    stored = configs.recipe_version.upgrade({"data": {"source": "folder"}})
    config = tiny_config({"recipe_version": stored["recipe_version"]})
    assert configs.for_platform(config, "cpu").data.layout == "0.1.0"
    assert config.data.layout == "auto"
    assert configs.for_platform(tiny_config({"recipe_version": 1, "data.layout": "flat"}), "cpu").data.layout == "flat"


@pytest.mark.parametrize(("split", "count", "text"), [
    ("test", 1, r"--config\.data\.eval_split=''"), ("train[99%:]", 5, r"--config\.data\.val_split=''")])
def test_few_pictures_of_ones_own_say_what_to_set(split, count, text, tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(count)))
    with pytest.raises(UserError, match=text):
        registry.load(fields(tmp_path, val_split="train[99%:]"), split)


def test_a_scene_parsing_folder_as_its_authors_give_it(tmp_path):
    for part, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            for kind, value in (("images", 9), ("annotations", i)):
                (tmp_path / kind / part).mkdir(parents=True, exist_ok=True)
                ending = "jpg" if kind == "images" else "png"
                Image.new("L" if ending == "png" else "RGB", (8, 8), value).save(
                    tmp_path / kind / part / f"ADE_{i}.{ending}")
    config = recipe(RECIPES[0].with_name("segment.py"), "scene_parse150")
    config.data.update(path=str(tmp_path / "images"), mask_key=str(tmp_path / "annotations"), name="")
    assert config.method.classes == 150
    found = {split: registry.load(config.data, split) for split in ("train", config.data.eval_split)}
    assert [source.size for source in found.values()] == [3, 2]
    assert [int(found["train"].read(i).mask[0, 0]) for i in range(3)] == [255, 0, 1]
