"""Arrays, PIL images and files give the very patches that evaluations see."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mae_jax.data import PatchOrder
from mae_jax.data.image_bounds import BadImage
from mae_jax.data.sources.base import Example
from mae_jax.data.transforms.example import ExampleBuilder
from mae_jax.errors import UserError
from mae_jax.inference.images import as_example, as_list, patches_of
from tests.helpers.tiny import tiny_config, tiny_method

RATIO = 0.875


@pytest.fixture(scope="module")
def builder():
    config = tiny_config({"data.image_size": (16, 24)})
    return ExampleBuilder(config, PatchOrder("identity", (4, 6), 0), tiny_method(config).eval_spec())


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def evaluated(builder, content):
    return builder.evaluate(Example(content), 0, 0, RATIO)["patches"]


NOISE = np.random.default_rng(0)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (7, 5), (16, 24), (333, 40)])
def test_pixels_of_any_size_are_seen_as_an_evaluation_sees_the_file(builder, size, tmp_path):
    pixels = NOISE.integers(0, 256, (*size, 3), dtype=np.uint8)
    content = png(Image.fromarray(pixels))
    (tmp_path / "a.png").write_bytes(content)
    wanted = evaluated(builder, content)
    given = [pixels, pixels[::-1][::-1], jnp.asarray(pixels), Image.fromarray(pixels), Image.open(tmp_path / "a.png"),
             content, str(tmp_path / "a.png"), tmp_path / "a.png"]
    for image in given:
        np.testing.assert_array_equal(patches_of(builder, image, RATIO, True), wanted)


MODES = {
    "gray": NOISE.integers(0, 256, (9, 8), dtype=np.uint8),
    "gray, one channel": NOISE.integers(0, 256, (9, 8, 1), dtype=np.uint8),
    "RGBA": NOISE.integers(0, 256, (9, 8, 4), dtype=np.uint8),
    "16 bits": NOISE.integers(0, 65536, (9, 8), dtype=np.uint16),
}


@pytest.mark.parametrize("pixels", MODES.values(), ids=MODES)
def test_other_modes_become_what_a_file_of_them_does(builder, pixels):
    plain = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    content = png(Image.fromarray(plain))
    for image in (pixels, Image.fromarray(plain)):
        np.testing.assert_array_equal(patches_of(builder, image, RATIO, True), evaluated(builder, content))


@pytest.mark.parametrize("upright", [True, False])
def test_a_pil_image_is_turned_as_its_file_is(upright):
    config = tiny_config({"data.exif": "apply" if upright else "ignore"})
    builder = ExampleBuilder(config, PatchOrder("identity", (4, 4), 0), tiny_method(config).eval_spec())
    exif = Image.Exif()
    exif[0x0112] = 6
    content = png(Image.fromarray(NOISE.integers(0, 256, (9, 30, 3), dtype=np.uint8)), exif=exif)
    seen = patches_of(builder, Image.open(io.BytesIO(content)), RATIO, upright)
    np.testing.assert_array_equal(seen, evaluated(builder, content))


@pytest.mark.parametrize(("image", "line"), [
    (np.zeros((4, 4, 3), np.float32), "float32 .*expected uint8.*255 \\* image"),
    (np.zeros((4, 4, 3), np.int64), "int64 .*expected uint8"),
    (np.zeros((4, 4, 4), np.uint16), "uint16 .*expected uint8"),
    (np.zeros((4, 4, 2), np.uint8), "shape .4, 4, 2."),
    (np.zeros((0, 4, 3), np.uint8), "shape .0, 4, 3."),
    (np.zeros(4, np.uint8), "shape .4."),
    (np.zeros((3, 40, 40), np.uint8), "channels come last"),
    (Image.fromarray(np.zeros((4, 4), np.float32)), "mode F, whose range of values is unknown"),
    (Image.fromarray(np.zeros((4, 4), np.int32)), "mode I, whose range of values is unknown"),
    (7, "type int"),
    ("nowhere.png", "nowhere.png cannot be read: No such file"),
    (b"no image", "an image cannot be read: not a JPEG")])
def test_what_is_no_image_is_refused_in_one_line(builder, image, line):
    with pytest.raises(UserError, match=line):
        patches_of(builder, image, RATIO, True)


def test_a_broken_file_that_pil_had_only_opened_is_a_bad_image():
    content = png(Image.fromarray(NOISE.integers(0, 256, (90, 90, 3), dtype=np.uint8)))
    with pytest.raises(BadImage):
        as_example(Image.open(io.BytesIO(content[:2000])))


def test_one_image_or_several():
    one = np.zeros((5, 6, 3), np.uint8)
    assert [len(as_list(x)) for x in (one, [one, one], np.stack([one] * 4), "a.png", one[..., 0], (one,), [])] == [
        1, 2, 4, 1, 1, 1, 0]
    for kind in (str, object):
        assert as_list(np.array(["a.png", "b.png"], kind)) == ["a.png", "b.png"]
    with pytest.raises(UserError, match=r"neither an image .* gray ones are given as a list of \[height, width\]$"):
        as_list(np.zeros((2, 5, 6), np.uint8))
    with pytest.raises(UserError, match="channels come last"):
        as_list(np.zeros((3, 5, 6), np.uint8))
    with pytest.raises(UserError, match="images of type NoneType"):
        as_list(None)
