"""Mosaics: pixels lie where their photograph's crop has them, and the splits share none."""

import numpy as np
import pytest

from mae_jax.config import default
from mae_jax.data.sources import photo_crops, photo_mosaic
from mae_jax.data.sources.photo_mosaic import IMAGE_SIDE, PARTS, _enlarged
from mae_jax.data.sources.splits import parse
from mae_jax.errors import UserError


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_part_of_a_mosaic_is_cut_from_a_crop_of_the_photograph_that_its_mask_names(split):
    data = default().data
    mosaics, crops = photo_mosaic.load(data, parse(split)), photo_crops.load(data, parse(split))
    assert mosaics.size == photo_mosaic.SIZES[split]
    example = mosaics.read(7)
    assert example.image.shape == (IMAGE_SIDE, IMAGE_SIDE, 3)
    assert example.mask.shape == (IMAGE_SIDE, IMAGE_SIDE)
    found = np.unique(example.mask)
    assert 2 <= len(found) <= PARTS
    for photograph in found:
        inside = example.mask == photograph
        candidates = (crops.read(i).image for i in range(int(photograph), crops.size, len(photo_crops.CLASSES)))
        assert any((_enlarged(crop)[inside] == example.image[inside]).all() for crop in candidates)


def test_a_mosaic_is_the_same_each_time_and_another_for_each_index_and_split():
    data = default().data
    train, test = (photo_mosaic.load(data, parse(split)) for split in ("train", "test"))
    again = photo_mosaic.load(data, parse("train[3:]")).read(0)
    np.testing.assert_array_equal(train.read(3).image, again.image)
    np.testing.assert_array_equal(train.read(3).mask, again.mask)
    assert (train.read(3).mask != train.read(4).mask).any()
    assert (train.read(3).mask != test.read(3).mask).any()


def test_all_photographs_are_about_as_frequent():
    source = photo_mosaic.load(default().data, parse("train[:300]"))
    counts = np.bincount(np.concatenate([source.read(i).mask.ravel() for i in range(300)]), minlength=17)
    assert counts.min() > 0.5 * counts.mean()
    assert counts.max() < 2 * counts.mean()


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="split 'val'"):
        photo_mosaic.load(default().data, parse("val"))
