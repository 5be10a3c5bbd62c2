import io

import numpy as np
import pytest
from PIL import Image

from mae_jax.data import decode, photo_crops
from mae_jax.data.decode import BadPicture, Box, Picture


def pattern(height=40, width=60):
    """A smooth picture, so that lossy formats stay close."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4, y * 5, 255 - x * 2 - y], -1).astype(np.uint8)


def encode(pixels, kind, mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "mode", "error"), [
    ("PNG", "RGB", 0), ("BMP", "RGB", 0), ("WEBP", "RGB", 0), ("JPEG", "RGB", 3), ("JPEG", "CMYK", 3),
    ("GIF", "P", 40), ("PNG", "P", 40)])
def test_every_format_decodes_to_rgb(kind, mode, error):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    pixels = decode.decode(encode(pattern(), kind, mode, **options))
    assert pixels.shape == (40, 60, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - pattern()).mean() <= error


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_becomes_three_equal_channels(mode):
    pixels = decode.decode(encode(pattern(), "PNG", mode))
    assert (pixels == pixels[..., :1]).all()


def test_sixteen_bits_keep_their_upper_eight():
    deep = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    pixels = decode.decode(encode_raw(deep))
    assert (pixels[..., 0] == deep >> 8).all()


def encode_raw(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_transparency_is_laid_over_white():
    rgba = np.dstack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 128, np.uint8)])
    rgba[0, 0, 3] = 0
    pixels = decode.decode(encode_raw(rgba))
    assert (pixels[0, 0] == 255).all()
    assert np.abs(pixels[1, 1].astype(int) - 127).max() <= 1


def test_a_transparent_palette_colour_becomes_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    file = io.BytesIO()
    image.save(file, "GIF", transparency=0)
    pixels = decode.decode(file.getvalue())
    assert (pixels[0, 0] == 255).all()
    assert (pixels[0, 1] == [40, 50, 60]).all()


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert (decode.decode(file.getvalue())[0, 0] == [255, 0, 0]).all()


def test_jpeg_decoding_has_the_bits_of_pil():
    data = encode(pattern(), "JPEG")
    assert (decode.decode(data) == np.asarray(Image.open(io.BytesIO(data)))).all()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("keep", [0.5, 0.9, -1, -2])
def test_a_jpeg_cut_short_is_bad_even_where_only_its_top_is_wanted(keep, fast):
    data = encode(pattern(200, 300), "JPEG", quality=95)
    data = data[:int(len(data) * keep) if keep > 0 else keep]
    with pytest.raises(BadPicture):
        Picture(data, fast).view(Box(0, 0, 8, 8), (8, 8))


@pytest.mark.parametrize("data", [b"", b"hello, this is text", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_what_is_no_picture_is_bad(data):
    with pytest.raises(BadPicture, match=r"\w"):
        decode.decode(data)


def test_a_png_cut_short_is_bad():
    data = encode(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8), "PNG")
    with pytest.raises(BadPicture):
        decode.decode(data[:len(data) // 2])


def test_more_than_fifty_megapixels_are_refused_from_the_header():
    with pytest.raises(BadPicture, match="50 megapixels"):
        Picture(encode(np.zeros((5001, 10000), np.uint8), "PNG", "L"))


def test_other_formats_are_refused():
    with pytest.raises(BadPicture, match="not a JPEG"):
        Picture(encode(pattern(), "TIFF"))


@pytest.mark.parametrize(("box", "target"), [
    (Box(10, 21, 250, 255), (224, 224)), (Box(30, 11, 300, 301), (96, 96)), (Box(3, 7, 290, 440), (32, 48)),
    (Box(100, 100, 50, 60), (96, 96))])
def test_a_fast_view_of_a_photograph_stays_close_to_the_exact_one(box, target):
    photograph = photo_crops._photograph(photo_crops._paths()[photo_crops.CLASSES.index("coffee")])
    data = encode(photograph, "JPEG", quality=90)
    exact, fast = (np.asarray(Picture(data, fast).view(box, target)).astype(int) for fast in (False, True))
    assert 0 < np.abs(exact - fast).mean() < 2
    shifted = np.abs(exact[:, 1:] - fast[:, :-1]).mean()
    assert shifted > 1.5 * np.abs(exact - fast).mean()  # it is not moved by a pixel


def test_fast_pictures_that_are_no_plain_jpeg_are_decoded_exactly():
    data, box = encode(pattern(), "PNG"), Box(9, 11, 20, 30)
    exact, fast = (np.asarray(Picture(data, fast).view(box, (16, 16))) for fast in (False, True))
    assert (exact == fast).all()


def test_a_jpeg_without_its_end_marker_is_bad_even_if_it_decodes():
    data = encode(np.full((16, 16, 3), 90, np.uint8), "JPEG")
    Picture(data)
    with pytest.raises(BadPicture, match="end marker"):
        Picture(data[:-2])
    Picture(data + b"trailing bytes of a camera" * 10)
