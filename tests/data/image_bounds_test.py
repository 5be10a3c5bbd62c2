"""What an image may cost: small files that would take minutes or gigabytes are bad, and what only looks odd is read."""

import io
import os
import re
import struct
import time
import zlib

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mae_jax.data import decode, image_bounds
from mae_jax.data.decode import BadImage, Box, StoredImage, decode_mask, to_rgb
from mae_jax.data.readers import random_access
from mae_jax.data.reading import COMMON, Reading
from mae_jax.data.sources import base
from mae_jax.errors import UserError
from tests.data.decode_test import encode, pattern, png
from tests.helpers.records import config


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunks(*chunks, at_end=False, gray=False):
    """A PNG of `pattern`, or of its first channel, with further chunks after its header, or before its end."""
    data = encode(pattern()[..., :1].repeat(3, -1) if gray else pattern(), "PNG")
    at = data.index(b"IEND") - 4 if at_end else 33
    return data[:at] + b"".join(chunks) + data[at:]


def packed(megabytes):
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1_000_000)) for _ in range(megabytes)) + packer.flush()


MEGABYTE = packed(1)
ODD_CHUNKS = {
    "profile": lambda: [chunk(b"iCCP", b"scanner\0\0" + packed(3))],
    "huge profile": lambda: [chunk(b"iCCP", b"bomb\0\0" + packed(70))],
    "broken profile": lambda: [chunk(b"iCCP", b"broken\0\0" + b"no zlib")],
    "text": lambda: [chunk(b"zTXt", b"Description\0\0" + packed(3))],
    "many texts": lambda: [chunk(b"zTXt", b"Text%d\0\0" % i + MEGABYTE) for i in range(80)],
    "international": lambda: [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed(3))],
    "plain": lambda: [chunk(b"tEXt", b"Comment\0" + b"x" * 3_000_000)],
}


@pytest.mark.parametrize("what", ODD_CHUNKS)
@pytest.mark.parametrize("at_end", [False, True])
def test_a_png_is_read_whatever_its_profile_and_text_unpack_to(what, at_end):
    data = with_chunks(*ODD_CHUNKS[what](), at_end=at_end)
    assert (decode.decode(data) == pattern()).all()
    assert (decode_mask(with_chunks(*ODD_CHUNKS[what](), at_end=at_end, gray=True)) == pattern()[..., 0]).all()
    if not at_end:
        with pytest.raises(BadImage):
            decode.decode(data[:-40])


def test_what_of_a_png_decides_over_its_pixels_stays():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0)
    data = file.getvalue()
    odd = data[:33] + chunk(b"tEXt", b"a\0b") + data[33:]
    assert image_bounds.without_ballast(odd) == data
    assert (decode.decode(odd) == decode.decode(data)).all()
    assert image_bounds.without_ballast(data) is data


def test_of_a_png_nothing_after_its_end_is_looked_at():
    data = encode(pattern(), "PNG")
    assert (decode.decode(data + bytes(12 * (image_bounds.MAX_PARTS + 9))) == pattern()).all()


def scans(count, size=64):
    """A progressive JPEG whose last scan comes so often that it has `count` of them."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), "gray").save(file, "JPEG", progressive=True)
    data = file.getvalue()
    starts = [found.start() for found in re.finditer(image_bounds.SCAN_MARKER, data)]
    return data[:-2] + data[starts[-1]:-2] * (count - len(starts)) + data[-2:]


def test_a_jpeg_of_many_scans_is_bad_before_it_is_decoded():
    decode.decode(scans(image_bounds.MAX_SCANS))
    for read in (StoredImage, decode_mask, lambda data: StoredImage(data, fast=True)):
        began = time.monotonic()
        with pytest.raises(BadImage, match=r"101 scans.* 100"):
            read(scans(101))
        with pytest.raises(BadImage, match="1000 scans"):
            read(scans(1000, 2000))  # 4 megapixels: 12 s
        assert time.monotonic() - began < 1


def test_scans_are_bounded_by_the_work_that_they_are(monkeypatch):
    monkeypatch.setattr(image_bounds, "MAX_SCANNED", 64 * 64 * 30)
    StoredImage(scans(30))
    with pytest.raises(BadImage, match=r"31 scans.* 30"):
        StoredImage(scans(31))


def test_markers_in_what_follows_a_jpeg_or_in_its_metadata_are_no_scans():
    data, many = encode(pattern(), "JPEG"), image_bounds.SCAN_MARKER * 500
    assert (decode.decode(data + many + image_bounds.END_MARKER) == decode.decode(data)).all()
    segment = b"\xff\xe5" + struct.pack(">H", len(many) + 2) + many
    assert (decode.decode(data[:2] + segment + data[2:]) == decode.decode(data)).all()


def in_header(kind, more):
    """An image with so much between its header and its pixels."""
    data = encode(pattern(), kind)
    at = 2 if kind == "JPEG" else 13 + 3 * 256
    return data[:at] + more + data[at:]


PARTS = {  # files of a few megabytes for each part of which PIL would take microseconds
    "png": lambda: with_chunks(chunk(b"abCd", b"") * 300_000),
    "data": lambda: with_chunks(chunk(b"IDAT", b"") * 300_000),
    "jpeg": lambda: in_header("JPEG", b"\xff\xfe\0\2" * 1_000_000),
    "fillers": lambda: in_header("JPEG", b"\xff" * 5_000_000),
    "restarts": lambda: in_header("JPEG", b"\xff\xd0" * 2_000_000),
    "zeros": lambda: in_header("JPEG", b"\xff\0" * 2_000_000),
    "jumps": lambda: in_header("JPEG", b"\xff\xd8\xff\xf0" + b"\xff\xfe\0\2" * 1_000_000),
    "gif": lambda: in_header("GIF", b"\x21\xfe" + b"\1x" * 150_000 + b"\0"),
}


@pytest.mark.parametrize("what", PARTS)
def test_a_file_of_very_many_parts_is_bad_at_once(what):
    data, began = PARTS[what](), time.monotonic()
    with pytest.raises(BadImage, match="100000 parts"):
        StoredImage(data)
    assert time.monotonic() - began < 2


def test_a_gif_is_read_whatever_its_comments():
    gif, frame = encode(pattern(), "GIF"), 13 + 3 * 256
    comments = (b"\x21\xfe" + (b"\xff" + b"x" * 255) * 40_000 + b"\0")  # PIL would join 40,000 times up to 10 MB
    began = time.monotonic()
    assert (decode.decode(gif[:frame] + comments + gif[frame:]) == decode.decode(gif)).all()
    assert time.monotonic() - began < 2
    with pytest.raises(BadImage):
        decode.decode(gif[:frame] + comments)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as decode.py sets it for all of a run
def test_a_long_row_is_bad_before_it_takes_memory_for_its_resizing():
    row = png(49_999_999, 1, bytes(49_999_999))
    assert len(row) < 50_000
    for data in (row, png(1, 70_000, bytes(70_000))):
        with pytest.raises(BadImage, match=r"side of (49999999|70000) pixels; at most 65535"):
            StoredImage(data)
    with pytest.raises(BadImage, match="70000"):
        StoredImage(np.broadcast_to(np.uint8(0), (1, 70_000, 3)))
    assert np.asarray(StoredImage(png(65_535, 1, bytes(65_535))).view(Box(0, 0, 1, 65_535), (8, 8))).shape == (8, 8, 3)


def test_a_file_of_too_many_bytes_is_bad(monkeypatch):
    monkeypatch.setattr(image_bounds, "MAX_BYTES", 1000)
    with pytest.raises(BadImage, match="at most 1000"):
        StoredImage(encode(pattern(), "BMP"))


@pytest.mark.parametrize(("content", "line"), [
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"<!DOCTYPE html><html>", "HTML"),
    (b"\0\0\0\x1cftypheic" + bytes(20), "HEIC"), (b"II*\0" + bytes(20), "TIFF"), (b"<svg xmlns=''/>", "SVG"),
    (b"", "empty"), (bytes(1000), "zeros"), (b"\x1f\x8b\x08" + bytes(20), "gzip")])
def test_what_is_no_picture_is_told_by_what_it_is(content, line):
    with pytest.raises(BadImage, match=line):
        StoredImage(content, reading=Reading(formats=COMMON))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB"])
def test_strips_over_white_have_the_pixels_of_the_whole(mode, monkeypatch):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (37, 23, 4), dtype=np.uint8))
    image = image.convert("RGB").quantize(32) if mode == "P" else image.convert(mode)
    if mode in ("P", "RGB"):
        image.info["transparency"] = bytes(range(0, 256, 8)) if mode == "P" else image.getpixel((3, 3))
    rgba = image.convert("RGBA")
    wanted = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    for pixels in (1, 23 * 5, 10**6):
        monkeypatch.setattr(decode, "STRIP", pixels)
        assert (np.asarray(to_rgb(image)) == np.asarray(wanted)).all()


@pytest.fixture
def decodings(monkeypatch):
    """Counts how often pixels are decoded; nothing is remembered from before."""
    counted, real = [], decode.to_rgb
    monkeypatch.setattr(decode, "_remembered", decode._Remembered())
    monkeypatch.setattr(decode, "to_rgb", lambda image: counted.append(1) or real(image))
    return counted


def broken(seed=0):
    data = bytearray(encode(np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8), "PNG"))
    data[200] ^= 1
    return bytes(data)


def test_a_bad_image_is_decoded_once_and_a_good_one_of_its_length_each_time(decodings):
    bad, good = broken(), encode(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8), "PNG")
    assert len(bad) == len(good)
    reasons = []
    for _ in range(3):
        with pytest.raises(BadImage) as found:
            StoredImage(bad).whole()
        reasons.append(str(found.value))
        StoredImage(good).whole()
    assert len(decodings) == 1 + 3
    assert len(set(reasons)) == 1


def test_of_bad_images_a_bounded_number_is_remembered(decodings, monkeypatch):
    monkeypatch.setattr(decode, "MAX_REMEMBERED", 3)
    for _ in range(2):
        for seed in range(5):
            with pytest.raises(BadImage):
                StoredImage(broken(seed)).whole()
        assert decode._remembered._count <= 3
    assert len(decodings) > 5


def test_short_memory_is_no_fault_of_the_image(monkeypatch):
    def short(*_):
        raise MemoryError

    monkeypatch.setattr(decode, "_remembered", decode._Remembered())
    data = encode(pattern(), "PNG")
    with monkeypatch.context() as patch:
        patch.setattr(decode, "to_rgb", short)
        with pytest.raises(MemoryError):
            StoredImage(data).whole()
    assert StoredImage(data).whole().size == (60, 40)


def test_what_is_remembered_changes_no_batch(monkeypatch):
    """A source of good and bad images: all epochs alike, with memory and without."""
    stored = [broken(i) if i % 5 == 0 else encode(pattern() // (i + 1), "PNG") for i in range(20)]
    source = base.Source(20, lambda i: base.Example(stored[i], i), str)
    c = config("folder", "")

    def rows(remembers):
        monkeypatch.setattr(decode, "_remembered", decode._Remembered())
        if not remembers:
            monkeypatch.setattr(decode._remembered, "add", lambda *_: None)
        bad = random_access.deque(maxlen=100)
        build = base_builder(c)
        found = [random_access.train_example(source, build, c, bad, position) for position in range(60)]
        return [(row["id"], row["replaced"], row["patches"].tobytes()) for row in found], list(bad)

    assert rows(True) == rows(False)


def base_builder(c):
    from mae_jax.data.transforms.example import ExampleBuilder
    from tests.helpers.tiny import tiny_method

    method = tiny_method(c)
    return ExampleBuilder(c, method.patch_order(), method.batch_spec())


@pytest.mark.parametrize(("number", "kind"), [(24, UserError), (23, UserError), (12, MemoryError), (13, OSError)])
def test_a_machine_at_its_end_is_no_fault_of_an_image(tmp_path, monkeypatch, number, kind):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    file = epath.Path(tmp_path / "a.png")
    file.write_bytes(b"any")
    assert decode.read_file(file) == b"any"
    monkeypatch.setattr(type(file), "read_bytes", fails)
    with pytest.raises(kind):
        decode.read_file(file)


@pytest.mark.parametrize(("number", "failures", "read"), [(5, 3, True), (116, 1, True), (5, 4, False), (13, 1, False)])
def test_what_passes_is_tried_again_and_what_stays_is_raised(tmp_path, monkeypatch, number, failures, read):
    left = [OSError(number, os.strerror(number))] * failures

    def fails(path):
        if left:
            raise left.pop()
        return b"any"

    file = epath.Path(tmp_path / "a.png")
    file.write_bytes(b"any")
    monkeypatch.setattr(type(file), "read_bytes", fails)
    monkeypatch.setattr(decode, "WAITS", (0.0, 0.0, 0.0))
    if read:
        assert decode.read_file(file) == b"any"
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            decode.read_file(file)


def test_of_a_file_that_is_too_large_nothing_is_read(tmp_path):
    file = epath.Path(tmp_path / "a.jpg")
    with open(file, "wb") as sparse:
        sparse.truncate(image_bounds.MAX_BYTES + 1)
    with pytest.raises(BadImage, match="500000001 bytes"):
        decode.read_file(file)
