"""Validation, repeats, several labels, masks, further test sets and sizes, on data sets that TFDS itself wrote."""

import io
import itertools
import re
import shutil

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mae_jax import config as configs
from mae_jax import data
from mae_jax.data.decode import BadImage, decode_mask
from mae_jax.data.readers import random_access
from mae_jax.data.sources import expected_sizes, registry, splits
from mae_jax.errors import UserError
from mae_jax.ops.patches import PatchGrid
from tests.helpers.tiny import tiny_method

SIDE, SIZES = 16, {"train": 60, "test": 10}
NAMES = ("ant", "bee", "cat")


def encoded(array, kind):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, quality=95)
    file.seek(0)
    return file


def outline(i):
    """A mask like those of oxford_iiit_pet: 1 left of column i % SIDE, 2 right of it, 3 in the last row."""
    mask = np.full((SIDE, SIDE), 2, np.uint8)
    mask[:, :i % SIDE] = 1
    mask[-1] = 3
    return mask


def example(i):
    return {"image": encoded(np.full((SIDE, SIDE, 3), i, np.uint8), "JPEG"), "label": NAMES[i % 3],
            "labels": [name for k, name in enumerate(NAMES) if i >> k & 1],
            "segmentation_mask": encoded(outline(i), "PNG")}


FEATURES = {
    "image": tfds.features.Image(encoding_format="jpeg"), "label": tfds.features.ClassLabel(names=NAMES),
    "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=NAMES)),
    "segmentation_mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png")}


def store(folder, name, file_format="tfrecord", version="1.0.0", features=FEATURES, make=example, counts=SIZES):
    sets = {split: [(i, make(i)) for i in range(size)] for split, size in counts.items()}
    tfds.dataset_builders.store_as_tfds_dataset(
        name, version, features=tfds.features.FeaturesDict(features), split_datasets=sets, data_dir=str(folder),
        file_format=file_format, disable_shuffling=True)
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    store(folder, "array", "array_record")
    return store(folder, "stream")


def config(stored, name="stream", batch=8, **fields):
    c = configs.default()
    c.batch_size = batch
    c.data.update({"source": "tfds", "path": str(stored), "name": name, "image_size": (SIDE, SIDE), "readers": 4,
                   "threads": 2, "augment": "none", **fields})
    c.eval.crop_ratio = (1.0,)
    c.model.patch = (8, 8)
    return c


def build(c, rows=None, **more):
    method = tiny_method(c)
    shapes = {"labels": (3,), "pixel_label": (4, 64)}
    spec = method.batch_spec() | {name: jax.ShapeDtypeStruct((c.batch_size, *(shape or shapes[name])), np.uint8)
                                  for name, shape in more.items()}
    return data.OpenedData(c, method.data_needs(c)).batches(spec, method.patch_order(), rows=rows)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


KINDS = pytest.mark.parametrize("name", ["stream", "array"])


@KINDS
def test_validation_reads_its_own_part_and_training_none_of_it(stored, name):
    inputs = build(config(stored, name, train_split="train[:90%]", val_split="train[90%:]"))
    assert (inputs.num_train // 4 * 4, inputs.num_val, inputs.parts["test"].size) == (52, 6, 10)
    assert "6 in train[90%:]" in inputs.description
    batch, = inputs.validate()
    assert np.rint(batch["patches"][:6].mean((1, 2))).tolist() == [54, 55, 56, 57, 58, 59]
    trained = np.concatenate([batch["patches"].reshape(8, -1).mean(1) for batch in take(inputs.train(0), 14)])
    assert trained.max() < 54


def test_without_a_validation_split_there_is_nothing_to_validate(stored):
    inputs = build(config(stored))
    assert (list(inputs.validate()), inputs.num_val) == ([], 0)


@pytest.mark.parametrize(("one", "other", "shared"), [
    ("train", "train[90%:]", True), ("train[:90%]", "train[90%:]", False), ("train[:91%]", "train[90%:]", True),
    ("train[:100]", "train[100:]", False), ("train[:101]", "train[100:]", True),
    ("train[:100]", "train[90%:]", True)])
def test_slices_of_a_split_that_may_share_pictures_are_known(one, other, shared):
    assert splits.overlap(splits.parse(one), splits.parse(other)) == shared


@pytest.mark.parametrize(("fields", "with_what"), [
    ({"val_split": "train[90%:]"}, "train_split='train'"), ({"val_split": "test"}, "eval_split='test'"),
    ({"train_split": "train[:40]", "val_split": "train[90%:]"}, "train_split")])
def test_choosing_on_pictures_that_are_trained_on_or_reported_on_is_refused(stored, fields, with_what):
    with pytest.raises(UserError, match=f"val_split=.*data.{re.escape(with_what)}"):
        build(config(stored, **fields))


def test_in_data_without_splits_all_names_of_the_held_out_part_are_the_same_pictures(tmp_path):
    np.savez(tmp_path / "all.npz", image=np.zeros((40, SIDE, SIDE, 3), np.uint8))
    with pytest.raises(UserError, match=r"val_split='val' .*data\.eval_split='test'"):
        build(config("", source="npz", path=str(tmp_path / "all.npz"), val_split="val"))
    for folder in ("train", "val", "test"):
        (tmp_path / "own" / folder).mkdir(parents=True)
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "own" / folder / "same.png")
    own = config("", source="folder", path=str(tmp_path / "own"), val_split="val", batch=1)
    assert {split: part.size for split, part in build(own).parts.items()} == {"train": 1, "val": 1, "test": 1}
    shutil.rmtree(tmp_path / "own" / "val")
    with pytest.raises(UserError, match="val_split='val' "):
        build(own)


@KINDS
def test_an_evaluation_at_another_crop_ratio_sees_less_of_the_picture(stored, name):
    inputs = build(config(stored, name, mask_key="segmentation_mask", mask_offset=1), pixel_label=())
    whole, part = (next(inputs.evaluate(*ratio))["pixel_label"] for ratio in ((), (0.5,)))
    assert (whole == 2).any()
    assert not (part == 2).any()  # the last row is cut off
    assert_equal(inputs.evaluate(), inputs.evaluate(1.0))


@KINDS
@pytest.mark.parametrize(("batch", "repeats"), [(8, 2), (12, 2), (12, 3), (8, 3)])
def test_repeats_are_spaced_copies_with_views_of_their_own(stored, name, batch, repeats):
    c = config(stored, name, batch=batch, repeats=repeats, augment="random")
    c.model.patch = (4, 4)
    share = batch if name == "array" else batch // 4
    distinct = -(-share // repeats)
    for found in take(build(c).train(3), 4):
        ids = found["id"].reshape(-1, share)
        for rows in ids:
            assert rows.tolist() == [rows[r % distinct] for r in range(share)]
            assert len(set(rows)) == distinct
        assert len({tuple(order) for order in found["order"]}) == batch


@KINDS
def test_a_pass_of_repeats_shows_each_picture_as_often(stored, name):
    c = config(stored, name, batch=12, repeats=3)
    ids = np.concatenate([batch["id"] for batch in take(build(c).train(0), 15)])  # 4 images a step, of 60
    assert np.bincount(ids).tolist() == [3] * 60


@KINDS
def test_resumed_and_divided_repeats_are_those_of_the_unbroken_run(stored, name):
    c = config(stored, name, batch=12, repeats=2, augment="random")
    whole = take(build(c).train(0), 24)
    assert_equal(take(build(c).train(17), 3), whole[17:20])
    for rows in ([0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]):
        part = take(build(c, np.array(rows)).train(5), 3)
        assert_equal(part, [{key: value[rows] for key, value in batch.items()} for batch in whole[5:8]])


def test_without_repeats_each_row_is_a_draw_of_its_own():
    assert [random_access.draw(position, 6, 1) for position in range(40)] == list(range(40))
    assert [random_access.draw(position, 6, 2) for position in range(6, 12)] == [3, 4, 5, 3, 4, 5]


def test_repeats_of_a_stream_lie_in_different_groups_that_are_mixed(stored):
    fields = {"batch": 16, "readers": 4, "repeats": 2}
    c = config(stored, **fields)
    c.unlock().method = configs.default("supervised").method
    c.method.update(mix_group=4, mixup=0.8)
    with pytest.raises(UserError, match=r"groups of 4 .* 4 rows .* 2 "):
        build(c)
    c.method.mix_group = 2
    assert build(c).num_train == 60


@KINDS
def test_several_labels_become_a_row_of_zeros_and_ones(stored, name):
    inputs = build(config(stored, name, label_key="labels"), labels=())
    assert inputs.classes == NAMES
    batches = [next(inputs.train(2)), *inputs.evaluate()]
    for batch in batches:
        shown = np.rint(batch["patches"].mean((1, 2))).astype(int)
        expected = (shown[:, None] >> np.arange(3) & 1) * batch["valid"].astype(int)[:, None]
        np.testing.assert_array_equal(batch["labels"], expected)
        assert batch["labels"].dtype == np.uint8
        assert (batch["label"] == -1).all()
    assert batches[-1]["valid"].sum() == 2  # padded


@KINDS
def test_pictures_of_several_labels_have_no_classes_for_who_wants_one(stored, name):
    inputs = build(config(stored, name, label_key="labels"))
    assert (inputs.classes, set(next(inputs.evaluate())["label"])) == ((), {-1})


@KINDS
def test_labels_that_are_not_there_name_the_config_field(stored, name):
    with pytest.raises(UserError, match=r"data\.label_key='label'"):
        build(config(stored, name), labels=())
    with pytest.raises(UserError, match=r"3 classes, .* 5"):
        build(config(stored, name, label_key="labels"), labels=(5,))


@KINDS
def test_masks_are_cut_and_permuted_as_their_pictures(stored, name):
    inputs = build(config(stored, name, mask_key="segmentation_mask", mask_offset=1, augment="none"), pixel_label=())
    for batch in [next(inputs.train(2)), *inputs.evaluate()]:
        assert batch["pixel_label"].dtype == np.uint8
        masks = PatchGrid(2, 2, 8, 8).unpatchify(np.repeat(batch["pixel_label"], 3, axis=2), batch["order"])[..., 0]
        for mask, picture, valid in zip(masks, batch["patches"], batch["valid"], strict=True):
            expected = outline(int(np.rint(picture.mean()))) - 1 if valid else np.full((SIDE, SIDE), 255)
            np.testing.assert_array_equal(mask, expected)


@KINDS
def test_masks_that_are_not_there_name_the_config_field(stored, name):
    with pytest.raises(UserError, match=r"'pixel_label'; data\.mask_key=''"):
        build(config(stored, name), pixel_label=())
    with pytest.raises(UserError, match="'segmentation_mask'"):
        build(config(stored, name, mask_key="segmentation_masks"), pixel_label=())


def test_numbers_below_the_offset_and_255_are_ignored():
    stored = encoded(np.array([[0, 1, 2, 255]], np.uint8), "PNG").read()
    assert decode_mask(stored, 1).tolist() == [[255, 0, 1, 255]]
    assert decode_mask(stored).tolist() == [[0, 1, 2, 255]]


def test_a_mask_is_the_index_into_its_palette_or_one_channel():
    palette = Image.new("P", (2, 1), 3)
    palette.putpalette([9, 9, 9] * 256)
    file = io.BytesIO()
    palette.save(file, "PNG")
    assert decode_mask(file.getvalue()).tolist() == [[3, 3]]
    assert decode_mask(encoded(np.array([[[4, 4, 4], [9, 9, 9]]], np.uint8), "PNG").read()).tolist() == [[4, 9]]
    with pytest.raises(BadImage, match="a mask of colors without a palette"):
        decode_mask(encoded(np.array([[[4, 4, 4], [4, 7, 0]]], np.uint8), "PNG").read())


@pytest.mark.parametrize("content", [b"text", b"", encoded(np.zeros((2, 2), np.uint16), "PNG").read()])
def test_masks_that_do_not_decode_or_have_16_bits_are_bad(content):
    with pytest.raises(BadImage, match="mask"):
        decode_mask(content)


def labeled(names):
    features = {key: FEATURES[key] for key in ("image",)} | {"label": tfds.features.ClassLabel(names=names)}
    return {"features": features, "make": lambda i: {"image": example(i)["image"], "label": names[i % len(names)]}}


def test_a_further_test_set_has_labels_of_the_training_classes_by_name(stored):
    store(stored, "further", counts={"test": 5, "other": 3}, **labeled(("cat", "ant")))
    inputs = build(config(stored))
    batch, = inputs.extra("further")
    assert batch["label"].tolist() == [2, 0, 2, 0, 2, -1, -1, -1]
    assert batch["label"].dtype == np.int32
    assert sum(batch["valid"].sum() for batch in inputs.extra("further:other")) == 3


def test_a_further_test_set_of_other_classes_is_refused(stored):
    store(stored, "strange", counts={"test": 5}, **labeled(("cat", "dog")))
    inputs = build(config(stored))
    with pytest.raises(UserError, match="class 'dog'"):
        inputs.extra("strange")
    with pytest.raises(UserError, match="split 'val'"):
        inputs.extra("strange:val")


def test_only_tfds_has_further_test_sets():
    with pytest.raises(UserError, match=r"needs data\.source='tfds'"):
        registry.open_test_set(configs.default().data, "imagenet_v2", ("a",))


def test_a_data_set_prepared_in_part_is_refused(tmp_path):
    version = str(tfds.builder("cifar10", data_dir=str(tmp_path)).version)
    store(tmp_path, "cifar10", version=version, **labeled(("ant", "bee")))
    with pytest.raises(UserError, match=r"cifar10 .*60 .* 50000 .*'train'"):
        build(config(tmp_path, "cifar10"))


def test_sizes_are_checked_of_known_splits_only():
    expected_sizes.check_size("cifar10", "test", 10_000)
    expected_sizes.check_size("cifar10", "validation", 3)
    expected_sizes.check_size("pictures", "train", 3)
    with pytest.raises(UserError, match=r"3668 .* 3669"):
        expected_sizes.check_size("oxford_iiit_pet", "test", 3668)


def test_held_out_pictures_of_classes_that_are_not_trained_on_are_refused(tmp_path):
    pictures = np.zeros((4, SIDE, SIDE, 3), np.uint8)
    np.savez(tmp_path / "more.npz", x_train=pictures, y_train=[0, 1, 2, 0], x_test=pictures, y_test=[0, 4, 1, 2])
    with pytest.raises(UserError, match=r"2 classes .*'3'"):
        build(config("", source="npz", path=str(tmp_path / "more.npz"), batch=1))


def test_a_folder_under_a_known_name_is_held_to_its_number_of_pictures(tmp_path):
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "one.png")
    with pytest.raises(UserError, match=r"aircraft .* 1 .* 6667 .*'train'"):
        build(config("", "aircraft", source="folder", path=str(tmp_path), eval_split=""))


def test_token_maps_are_refused_for_streams_whose_ids_are_no_rows_of_a_split(stored):
    c = config(stored)
    method = tiny_method(c)
    spec = {**method.eval_spec(), "tokens": jax.ShapeDtypeStruct((8, 4), np.int32)}
    with pytest.raises(UserError, match=r"random access.* stream here"):
        data.OpenedData(c).batches(spec, method.patch_order())


def test_the_table_of_sizes_names_data_sets_and_splits_of_tfds(tmp_path):
    for name in expected_sizes.SIZES.keys() - {"ade20k", "aircraft", "inaturalist2019"}:
        tfds.builder(name, data_dir=str(tmp_path))  # raises where the name is unknown
