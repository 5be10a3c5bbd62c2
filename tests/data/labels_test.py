"""A classifier that cannot be judged is refused before its first step, whatever it reads from."""

import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mae_jax import data
from mae_jax.data import labels
from mae_jax.errors import UserError
from tests.helpers.records import jpeg, record, write
from tests.helpers.tiny import tiny_config


def opened(**fields):
    return data.OpenedData(tiny_config({f"data.{name}": value for name, value in fields.items()}, "supervised"))


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_a_tfds_test_set_whose_labels_are_withheld_is_refused(tmp_path, file_format):
    features = {"image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=["a", "b", "c"])}
    sets = {"train": [(i, {"image": jpeg(i), "label": i % 3}) for i in range(9)],
            "test": [(i, {"image": jpeg(i), "label": -1}) for i in range(5)]}
    tfds.dataset_builders.store_as_tfds_dataset(
        "toy", "1.0.0", features=tfds.features.FeaturesDict(features), split_datasets=sets, data_dir=str(tmp_path),
        file_format=file_format, disable_shuffling=True)
    fields = {"source": "tfds", "name": "toy", "path": str(tmp_path), "readers": 1}
    with pytest.raises(UserError, match=r"eval_split='test' has no image with a label.*are a, b, c"):
        opened(**fields).check_labels()
    opened(**fields, eval_split="train").check_labels()


def test_records_without_labels_to_be_judged_by_are_refused(tmp_path):
    write(tmp_path / "train-0.tfrecord", [record(i) for i in range(9)])
    write(tmp_path / "test-0.tfrecord", [record(i, label=False) for i in range(5)])
    fields = {"source": "tfrecord", "path": str(tmp_path / "{split}-*.tfrecord"), "readers": 1}
    with pytest.raises(UserError, match=r"eval_split='test' has no image with a label.*are 0, 1, 2"):
        opened(**fields).check_labels()


def test_an_evaluation_split_that_is_not_read_needs_no_labels(tmp_path):
    write(tmp_path / "train-0.tfrecord", [record(i) for i in range(9)])
    write(tmp_path / "test-0.tfrecord", [record(i, label=False) for i in range(5)])
    config = tiny_config({"data.source": "tfrecord", "data.path": str(tmp_path / "{split}-*.tfrecord"),
                          "data.readers": 1, "eval.test": False}, "supervised")
    data.OpenedData(config).check_labels()


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_stored_batches_without_labels_are_refused(tmp_path, name):
    for each in ("train", "evaluate"):
        np.savez(tmp_path / f"{each}.npz", label=np.full(4, -1 if each == name else 1, np.int32))
    config = tiny_config({"data.source": "batches", "data.path": str(tmp_path)}, "supervised")
    with pytest.raises(UserError, match=rf"{name}\.npz has no image with a label"):
        labels.check_batches(config)


def segmented(root, values, classes):
    """Returns the data of a folder of 8 images whose masks have the given values."""
    for k in range(8):
        for kind, array in (("images", np.full((8, 8, 3), 9 * k, np.uint8)),
                            ("masks", np.resize(np.array(values, np.uint8), (8, 8)))):
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / kind / f"{k}.png")
    config = tiny_config({"data.source": "folder", "data.path": str(root / "images"), "data.mask_key":
                          str(root / "masks"), "method.classes": classes}, "segment")
    return data.OpenedData(config)


@pytest.mark.parametrize(("values", "seen"), [((0, 255), "0, 255"), ((0, 128), "0, 128"), ((4, 255), "4, 255")])
def test_masks_whose_values_leave_one_class_train_nothing(values, seen, tmp_path):
    """0 and 255 for background and object would train on background alone, with a mean IoU of 1."""
    known = values[0] if values[0] < 4 else "none"
    with pytest.raises(UserError, match=rf"values {seen} \(7 masks looked at\), of which {known} alone counts"):
        segmented(tmp_path, values, classes=4).check_masks(4)


@pytest.mark.parametrize(("values", "says"), [
    ((0, 1, 255), ""), ((0, 1, 2, 7), r"values that are not trained on: 7 \(0\.png\); method.classes=3 has 0 to 2"),
    ((1,), "have the value 1 alone")])
def test_mask_values_that_count_nowhere_are_told(values, says, tmp_path, caplog):
    segmented(tmp_path, values, classes=3).check_masks(3)
    assert len(caplog.records) == bool(says)
    assert re.search(says, caplog.text)
