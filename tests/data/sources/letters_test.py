import numpy as np
import pytest
from ml_collections import ConfigDict

from mae_jax.data.sources import letters, registry
from mae_jax.errors import UserError

DATA = ConfigDict({"source": "letters"})


@pytest.fixture(scope="module")
def test_images():
    source = registry.load(DATA, "test")
    return [source.read(i) for i in range(4 * 26)]


def test_the_letters_take_turns_and_are_known_without_an_image(test_images):
    for split, size in letters.SIZES.items():
        source = registry.load(DATA, split)
        assert source.size == size
        assert "".join(source.classes[source.label(i)] for i in range(27)) == "ABCDEFGHIJKLMNOPQRSTUVWXYZA"
    assert [image.label for image in test_images] == list(range(26)) * 4


def test_an_image_is_a_function_of_its_split_and_number(test_images):
    again = registry.load(DATA, "test[26:52]")
    assert all((again.read(i).image == test_images[26 + i].image).all() for i in (25, 0))
    assert (registry.load(DATA, "train").read(0).image != test_images[0].image).any()


def test_no_font_is_in_both_splits():
    assert not set(letters.FONTS["train"]) & set(letters.FONTS["test"])


def test_every_image_shows_a_whole_white_letter_on_something_darker(test_images):
    for image in test_images:
        pixels = image.image
        assert (pixels.shape, pixels.dtype) == ((letters.SIDE, letters.SIDE, 3), np.uint8)
        white = pixels.min(2) > 200
        assert 0.01 < white.mean() < 0.5
        assert np.median(pixels) < 160
        rows, columns = np.nonzero(white)
        assert np.ptp(rows) >= 0.4 * letters.SIDE
        assert max(np.ptp(rows), np.ptp(columns)) <= letters.SIDE


def test_each_font_draws_each_letter_in_its_own_way():
    for split in letters.FONTS:
        glyphs = np.stack([np.asarray(glyph) for face in letters._faces(split) for glyph in face])
        assert len(np.unique(glyphs.reshape(len(glyphs), -1), axis=0)) == len(letters.FONTS[split]) * 26
        assert (glyphs.max((1, 2)) > 200).all()


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'train'"):
        registry.load(DATA, "trian")
