import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.decode import BadImage
from mae_jax.data.sources import clipart, registry
from mae_jax.errors import UserError


@pytest.fixture(autouse=True)
def fresh_listing():
    clipart.pictures.cache_clear()


def draw(path, alpha=255, size=(80, 70)):
    """A red square on nothing, from (20, 10) to (59, 39); what is outside has a color that nobody shall see."""
    pixels = np.zeros((size[1], size[0], 4), np.uint8)
    pixels[..., 2] = 200
    pixels[10:40, 20:60] = (255, 0, 0, alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def load(root, split="train"):
    return registry.load(ConfigDict({"source": "clipart", "path": str(root)}), split)


def names(source):
    return {source.name(i) for i in range(source.size)}


def test_alpha_gives_the_mask_and_lies_over_white(tmp_path):
    draw(tmp_path / "food" / "apple_01.png")
    part = load(tmp_path, next(split for split in ("train", "test")
                               if (clipart.splits.share("food/apple") < 0.8) == (split == "train")))
    example = part.read(0)
    expected = np.zeros((70, 80), np.uint8)
    expected[10:40, 20:60] = 1
    assert (example.mask == expected).all()
    assert (example.image[expected == 1] == (255, 0, 0)).all()
    assert (example.image[expected == 0] == 255).all()
    assert part.classes[example.label] == "food"
    assert part.fields == ("pixel_label",)


@pytest.mark.parametrize(("alpha", "inside"), [(127, 0), (128, 1)])
def test_what_is_half_transparent_is_background(tmp_path, alpha, inside):
    draw(tmp_path / "a.png", alpha)
    assert clipart._decode((tmp_path / "a.png").read_bytes())[1][20, 30] == inside


def test_classes_are_fixed_and_every_picture_is_in_one_split(tmp_path):
    for i in range(60):
        draw(tmp_path / ("food", "animals/birds", "tools")[i % 3] / f"{chr(97 + i % 26)}thing{i}x.png")
    train, test = load(tmp_path), load(tmp_path, "test")
    assert not names(train) & names(test)
    assert len(names(train) | names(test)) == 60
    assert 3 < test.size < 25
    assert names(load(tmp_path, "train[:90%]")) | names(load(tmp_path, "train[90%:]")) == names(train)
    before = names(test)
    draw(tmp_path / "plants" / "tree_one.png")
    clipart.pictures.cache_clear()
    assert before <= names(load(tmp_path, "test")) <= before | {"plants/tree_one.png"}
    assert train.classes == clipart.CLASSES


def test_variants_of_a_drawing_stay_on_one_side(tmp_path):
    for series in "abcdefghijklmnop":
        for number in range(3):
            draw(tmp_path / "food" / f"{series}_{number:02d}.png")
    sides = [{clipart.series(name) for name in names(load(tmp_path, split))} for split in ("train", "test")]
    assert len(sides[0]) + len(sides[1]) == 16
    assert all(sides)


def test_icons_signs_links_and_pictures_without_transparency_or_size_are_left_out(tmp_path):
    draw(tmp_path / "food" / "kept.png")
    draw(tmp_path / "computer" / "icon.png")
    draw(tmp_path / "transportation" / "roadsigns" / "stop.png")
    draw(tmp_path / "food" / "tiny.png", size=(63, 80))
    draw(tmp_path / "food" / "long.png", size=(2001, 80))
    (tmp_path / "food" / "link.png").symlink_to(tmp_path / "food" / "kept.png")
    Image.new("RGB", (80, 80)).save(tmp_path / "food" / "opaque.png")
    assert clipart.pictures(clipart.epath.Path(tmp_path)) == ("food/kept.png",)


def test_without_the_package_the_command_that_installs_it_is_given(tmp_path):
    with pytest.raises(UserError, match="apt-get install openclipart-png"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("keep", [0, 20, -30])
def test_a_drawing_cut_short_is_a_bad_picture_and_not_left_out_without_a_word(tmp_path, keep):
    path = tmp_path / "food" / "a.png"
    draw(path)
    path.write_bytes(path.read_bytes()[:keep])
    assert clipart.pictures(clipart.epath.Path(tmp_path)) == ("food/a.png",)
    with pytest.raises(BadImage, match="not a PNG"):
        clipart._decode(path.read_bytes())
