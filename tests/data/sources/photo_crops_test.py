import numpy as np
import pytest
from ml_collections import ConfigDict

from mae_jax.data.sources import base, photo_crops, registry
from mae_jax.errors import UserError

DATA = ConfigDict({"source": "photo_crops"})


def test_seventeen_balanced_classes():
    for split, per_class in photo_crops.CROPS.items():
        source = registry.load(DATA, split)
        labels = [source.read(i).label for i in range(source.size)]
        assert len(source.classes) == 17
        assert (np.bincount(labels) == per_class).all()


def test_a_prefix_holds_every_class():
    assert {registry.load(DATA, "train[:17]").read(i).label for i in range(17)} == set(range(17))


@pytest.mark.parametrize("width", [384, 451, 512, 1411])
def test_no_pixel_is_in_both_splits_and_every_region_holds_the_largest_crop(width):
    train, test = photo_crops.regions(width)["train"], photo_crops.regions(width)["test"]
    assert train[1] < test[0]
    assert test[1] == width
    assert min(train[1] - train[0], test[1] - test[0]) >= photo_crops.SIDES[1]


def test_crops_are_squares_of_many_sizes():
    source = registry.load(DATA, "test")
    shapes = {source.read(i).image.shape for i in range(source.size)}
    low, high = photo_crops.SIDES
    assert all(height == width and low <= height <= high for height, width, _ in shapes)
    assert len(shapes) > 20


def test_a_missing_package_is_named_with_the_pip_line():
    with pytest.raises(UserError, match="pip install no-such-thing"):
        base.package_folder("no_such_thing", "no-such-thing", "photo_crops")


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'train'"):
        registry.load(DATA, "trian")
