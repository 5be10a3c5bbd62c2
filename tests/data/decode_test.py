import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from mae_jax.data import decode, image_bounds
from mae_jax.data.decode import BadImage, Box, StoredImage
from mae_jax.data.sources import photo_crops


def pattern(height=40, width=60):
    """A smooth image, so that lossy formats stay close."""
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
def test_gray_becomes_three_equal_channels(mode):
    pixels = decode.decode(encode(pattern(), "PNG", mode))
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_keep_their_upper_eight(channels):
    deep = np.arange(16 * 16 * channels, dtype=np.uint16).reshape(16, 16, channels) * 64
    deep[..., 3 if channels == 4 else 1:channels if channels in (2, 4) else 0] = 65535  # opaque
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    pixels = decode.decode(png(16, 16, deep.astype(">u2").tobytes(), bits=16, color=color))
    assert (pixels == deep[..., :3 if channels > 2 else 1] >> 8).all()


def png(width, height, values, bits=8, color=0):
    """A PNG file of the rows of `values`, which come one after the other."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows, packer = len(values) // height, zlib.compressobj()
    packed = b"".join(packer.compress(b"\0" + values[y * rows:(y + 1) * rows]) for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed + packer.flush())
            + chunk(b"IEND", b""))


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


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_a_transparent_palette_color_becomes_white(kind):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    file = io.BytesIO()
    image.save(file, kind, transparency=0)
    pixels = decode.decode(file.getvalue())
    assert (pixels[0, 0] == 255).all()
    assert (pixels[0, 1] == [40, 50, 60]).all()


def animation(kind):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], lossless=True)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(kind):
    assert (decode.decode(animation(kind))[0, 0] == [255, 0, 0]).all()


def turned(orientation):
    exif = Image.Exif()
    exif[decode.ORIENTATION] = orientation
    return encode(pattern(), "JPEG", exif=exif)


@pytest.mark.parametrize(("make", "converted"), [
    (lambda: encode(pattern(), "JPEG"), ()), (lambda: encode(pattern(), "JPEG", "L"), ("gray",)),
    (lambda: encode(pattern(), "JPEG", "CMYK"), ("CMYK",)),
    (lambda: encode(pattern(), "GIF", "P"), ("with a palette",)),
    (lambda: encode(pattern(), "PNG", "RGBA"), ("with transparency",)),
    (lambda: encode_raw(np.zeros((4, 4), np.uint16)), ("gray", "of 16 bits")),
    (lambda: png(1, 1, bytes(6), bits=16, color=2), ("of 16 bits",)),
    (lambda: animation("WEBP"), ("animated (first frame)",)), (lambda: animation("PNG"), ("animated (first frame)",)),
    (lambda: animation("GIF"), ("with a palette", "animated (first frame)")),
    (lambda: turned(6), ("turned by EXIF (ignored)",)), (lambda: turned(1), ())])
def test_what_is_converted_or_ignored_can_be_told(make, converted):
    picture = StoredImage(make())
    assert picture.converted() == converted
    picture.whole()
    assert picture.converted() == converted
    assert StoredImage(pattern()).converted() == ()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_cannot_be_read_turns_nothing(kind):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (10, 20, 30)).save(content, kind, exif=b"Exif\0\0garbage, and no header of TIFF")
    assert StoredImage(content.getvalue()).converted() == ()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_one_pixel_is_a_picture(kind, fast):
    data = encode(np.full((1, 1, 3), 90, np.uint8), kind)
    view = np.asarray(StoredImage(data, fast).view(Box(0, 0, 1, 1), (16, 24)))
    assert view.shape == (16, 24, 3)
    assert np.abs(view.astype(int) - 90).max() <= 2


def test_jpeg_decoding_has_the_bits_of_pil():
    data = encode(pattern(), "JPEG")
    assert (decode.decode(data) == np.asarray(Image.open(io.BytesIO(data)))).all()


def places(data):
    """Where a JPEG can be cut: within and after each part of its header, within its scans, before its last bytes."""
    found, place = {0, 1, 2, len(data) - 2, len(data) - 1}, 2
    while (marker := image_bounds.MARKER.search(data, place)) and marker[0] != image_bounds.END_MARKER:
        end = marker.end() + int.from_bytes(data[marker.end():marker.end() + 2])
        found |= {marker.start(), marker.start() + 1, marker.end() + 1, (marker.end() + end) // 2, end - 1, end}
        place = end
        if marker[0] == image_bounds.SCAN_MARKER:
            scan = image_bounds.MARKER.search(data, place).start()
            found |= {(end + scan) // 2, scan - 1}
    return sorted(found)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": True}])
def test_a_jpeg_cut_anywhere_is_bad_even_where_only_its_top_is_wanted(options, fast):
    if options.get("exif"):  # with a small image of its own inside, which is whole
        inner = encode(pattern(), "JPEG")
        options = {"exif": b"Exif\0\0II*\0\x08\0\0\0" + bytes(6) + inner}
    data = encode(pattern(200, 300), "JPEG", quality=95, **options)
    StoredImage(data, fast).view(Box(0, 0, 8, 8), (8, 8))
    cuts = places(data)
    assert len(cuts) > 25
    for cut in cuts:
        with pytest.raises(BadImage):
            StoredImage(data[:cut], fast).view(Box(0, 0, 8, 8), (8, 8))


def test_what_phones_append_to_a_jpeg_is_not_taken_for_a_cut():
    data, scan = encode(pattern(), "JPEG"), image_bounds.SCAN_MARKER
    for seed in range(20):
        film = np.random.default_rng(seed).integers(0, 256, 200_000, dtype=np.uint8).tobytes() + scan
        assert (decode.decode(data + film) == decode.decode(data)).all()
        with pytest.raises(BadImage, match="end marker"):
            StoredImage(data[:-2] + image_bounds.SCAN_MARKER)


@pytest.mark.parametrize("data", [b"", b"hello, this is text", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_what_is_no_picture_is_bad(data):
    with pytest.raises(BadImage, match=r"\w"):
        decode.decode(data)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.9])
def test_other_formats_cut_short_are_bad(kind, keep):
    data = encode(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8), kind)
    with pytest.raises(BadImage):
        decode.decode(data[:int(len(data) * keep)])


def declaring(kind, width, height, **options):
    """A file of a few bytes whose header declares a size that it does not have."""
    small = Image.new("RGB", (8, 8))
    file = io.BytesIO()
    small.save(file, kind, **options)
    data = bytearray(file.getvalue())
    if kind == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start:start + 4] = struct.pack(">HH", height, width)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif kind == "WEBP":  # the canvas of an animation
        data[24:30] = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return bytes(data)


def gif(screen, frame):
    """Forty bytes: a frame of `frame` pixels each way that is to be cleared after it was shown."""
    control = b"\x21\xf9\x04\x08\0\0\0\0"
    return (b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + bytes(6) + control + b","
            + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02\x02\x44\x01\0;")


def bombs():
    more = {"append_images": [Image.new("RGB", (8, 8), "red")], "save_all": True, "lossless": True}
    return {
        "png": png(12_000, 12_000, bytes(12_000 ** 2)), "gif": gif(60_000, 60_000), "gif frame": gif(8, 60_000),
        "webp": declaring("WEBP", 16_000, 16_000, **more), "jpeg": declaring("JPEG", 65_000, 65_000),
        "bmp": declaring("BMP", 60_000, 60_000), "just above": declaring("JPEG", 10_000, 5001)}


REFUSE_BOMBS = """
import resource, sys
from mae_jax.data import decode, image_bounds
from tests.data.decode_test import bombs
for name, data in bombs().items():
    assert len(data) < 200_000, name
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (decode.StoredImage, decode.decode_mask):
        try:
            read(data)
            sys.exit(f"{name} was read by {read}")
        except decode.BadImage as error:
            assert "50 megapixels" in str(error), (name, error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000, f"{name} took {grown} kB"
"""


@pytest.mark.slow
def test_pictures_of_more_than_fifty_megapixels_are_refused_before_they_take_memory():
    """The 12,000 x 12,000 PNG has all its pixels, in 140 kB; the GIF of 43 bytes took 4 GB before it was refused."""
    done = subprocess.run([sys.executable, "-c", REFUSE_BOMBS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as decode.py sets it for all of a run
def test_exactly_fifty_megapixels_are_read():
    assert StoredImage(declaring("JPEG", 10_000, 5000)).width == 10_000


def test_pixels_of_more_than_fifty_megapixels_are_refused_too():
    with pytest.raises(BadImage, match="50 megapixels"):
        StoredImage(np.broadcast_to(np.uint8(0), (5001, 10_000, 3)))


def test_other_formats_are_refused():
    with pytest.raises(BadImage, match="not a JPEG"):
        StoredImage(encode(pattern(), "PPM"))
    with pytest.raises(BadImage, match=r"not a JPEG.* but a JPEG XL image"):
        StoredImage(b"\xff\x0a and more")


def test_what_begins_as_an_image_and_is_none_is_called_damaged():
    with pytest.raises(BadImage, match=r"^damaged: it begins as a JPEG image"):
        StoredImage(b"\xff\xd8\xffnothing of the kind")


@pytest.mark.parametrize(("box", "target"), [
    (Box(10, 21, 250, 255), (224, 224)), (Box(30, 11, 300, 301), (96, 96)), (Box(3, 7, 290, 440), (32, 48)),
    (Box(100, 100, 50, 60), (96, 96))])
def test_a_fast_view_of_a_photograph_stays_close_to_the_exact_one(box, target):
    photograph = photo_crops.photograph(photo_crops.paths()[photo_crops.CLASSES.index("coffee")])
    data = encode(photograph, "JPEG", quality=90)
    exact, fast = (np.asarray(StoredImage(data, fast).view(box, target)).astype(int) for fast in (False, True))
    assert 0 < np.abs(exact - fast).mean() < 2
    shifted = np.abs(exact[:, 1:] - fast[:, :-1]).mean()
    assert shifted > 1.5 * np.abs(exact - fast).mean()  # it is not moved by a pixel


def test_fast_pictures_that_are_no_plain_jpeg_are_decoded_exactly():
    data, box = encode(pattern(), "PNG"), Box(9, 11, 20, 30)
    exact, fast = (np.asarray(StoredImage(data, fast).view(box, (16, 16))) for fast in (False, True))
    assert (exact == fast).all()


def test_a_jpeg_without_its_end_marker_is_bad_even_if_it_decodes():
    data = encode(np.full((16, 16, 3), 90, np.uint8), "JPEG")
    StoredImage(data)
    with pytest.raises(BadImage, match="end marker"):
        StoredImage(data[:-2])
    StoredImage(data + b"trailing bytes of a camera" * 10)
