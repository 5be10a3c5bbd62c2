"""Images of more than 8 bits, and formats that runs from before did not read."""

import io
import logging
import struct
import time

import numpy as np
import pytest
import tifffile
from ml_collections import ConfigDict
from PIL import Image, features

from mae_jax import config as configs
from mae_jax.data import reading, tiff, value_range
from mae_jax.data.decode import StoredImage
from mae_jax.data.image_bounds import BadImage
from mae_jax.data.reading import COMMON, Reading
from mae_jax.data.sources import registry
from mae_jax.data.sources.base import Example, Source
from mae_jax.errors import UserError
from mae_jax.methods import with_data
from tests.data.decode_test import png
from tests.helpers.tiny import tiny_config

DEEP = np.random.default_rng(0).integers(0, 65_536, (20, 30, 3), dtype=np.uint16)
ALL = Reading(span=(0, 65_535))


def tif(pixels, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def deep_png(pixels):
    height, width = pixels.shape[:2]
    color = {1: 0, 2: 4, 3: 2, 4: 6}[1 if pixels.ndim == 2 else pixels.shape[2]]
    return png(width, height, pixels.astype(">u2").tobytes(), bits=16, color=color)


def wanted(values, low=0.0, high=65_535.0):
    """The formula of data.range, in floats."""
    return np.clip(np.rint((values.astype(float) - low) / (high - low) * 255), 0, 255)


RGB = {"photometric": "rgb"}


@pytest.mark.parametrize("data", [
    tif(DEEP, **RGB), tif(DEEP, **RGB, byteorder=">"), tif(DEEP, **RGB, compression="zlib", predictor=True),
    tif(DEEP, **RGB, tile=(16, 16)), tif(DEEP, **RGB, bigtiff=True), tif(DEEP, **RGB, rowsperstrip=3),
    tif(DEEP, **RGB, compression="zlib", byteorder=">"), deep_png(DEEP)])
def test_three_channels_of_sixteen_bits_keep_all_bits(data):
    stored = StoredImage(data, reading=ALL)
    assert stored.deep
    np.testing.assert_array_equal(stored._all_bits().values, DEEP)
    np.testing.assert_array_equal(np.asarray(StoredImage(data, reading=ALL).whole()), wanted(DEEP))


@pytest.mark.parametrize("data", [
    tif(DEEP[..., 0]), tif(DEEP[..., 0], byteorder=">"), tif(DEEP[..., 0], compression="zlib"), deep_png(DEEP[..., 0])])
def test_gray_of_sixteen_bits_keeps_all_bits(data):
    found = np.asarray(StoredImage(data, reading=Reading(span=(100, 4095))).whole())
    np.testing.assert_array_equal(found, np.repeat(wanted(DEEP[..., :1], 100, 4095), 3, -1))


def test_where_zero_is_white_it_becomes_white():
    data = tif(DEEP[..., 0] >> 4, photometric="miniswhite")
    found = np.asarray(StoredImage(data, reading=Reading(span=(0, 4095))).whole())[..., 0]
    np.testing.assert_array_equal(found, 255 - wanted(DEEP[..., 0] >> 4, 0, 4095))


@pytest.mark.parametrize("channels", [2, 4])
def test_transparency_of_sixteen_bits_is_laid_over_white(channels):
    pixels = np.dstack([DEEP[..., :channels - 1], np.full(DEEP.shape[:2], 65_535, np.uint16)])
    pixels[0, 0, -1] = 0
    found = np.asarray(StoredImage(deep_png(pixels), reading=ALL).whole())
    assert (found[0, 0] == 255).all()
    np.testing.assert_array_equal(found[1:], np.broadcast_to(wanted(pixels[1:, :, :-1]), found[1:].shape))


@pytest.mark.parametrize("pixels", [DEEP, DEEP[..., 0]])
def test_runs_from_before_have_the_upper_eight_bits(pixels):
    here = configs.read_as_begun(configs.default().unlock())
    assert here.data.formats == "all"
    old = configs.read_as_begun(configs.from_dict({**configs.default().to_dict(), "recipe_version": 4}).unlock())
    assert (old.data.range, old.data.formats) == ("upper", "common")
    found = np.asarray(StoredImage(deep_png(pixels), reading=Reading.of(old.data)).whole())
    np.testing.assert_array_equal(found, np.broadcast_to((pixels >> 8).reshape(20, 30, -1), found.shape))
    with pytest.raises(BadImage, match=r"not a JPEG, PNG, WebP, BMP or GIF image, but a TIFF"):
        StoredImage(tif(pixels), reading=Reading.of(old.data))


EIGHT = (DEEP >> 8).astype(np.uint8)


@pytest.mark.parametrize(("data", "pixels"), [
    (tif(EIGHT, **RGB), EIGHT), (tif(EIGHT, **RGB, compression="zlib"), EIGHT), (tif(EIGHT[..., 0]), EIGHT[..., :1]),
    (tif(np.moveaxis(EIGHT, -1, 0), **RGB, planarconfig="separate"), EIGHT),
    (tif(EIGHT[..., 0], photometric="miniswhite"), 255 - EIGHT[..., :1]),
    (tif(EIGHT[..., 0] > 99, photometric="minisblack"), 255 * (EIGHT[..., :1] > 99))])
def test_a_tiff_of_eight_bits_is_read(data, pixels):
    np.testing.assert_array_equal(np.asarray(StoredImage(data).whole()), np.broadcast_to(pixels, EIGHT.shape))


def test_of_several_pages_the_first_counts_and_that_is_told():
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in (EIGHT, 255 - EIGHT):
            writer.write(page, photometric="rgb")
    stored = StoredImage(file.getvalue())
    np.testing.assert_array_equal(np.asarray(stored.whole()), EIGHT)
    assert stored.converted() == ("of several pages (first page)",)
    assert StoredImage(tif(EIGHT, **RGB)).converted() == ()


FIVE = np.zeros((20, 30, 5), np.uint8)


@pytest.mark.parametrize(("data", "line"), [
    (tif(FIVE, photometric="minisblack", planarconfig="contig"), "it has 5 channels"),
    (tif(FIVE[..., :4], photometric="rgb", extrasamples=[0]), "it has 4 channels"),
    (tif(DEEP.astype(np.float32), **RGB), "floating-point"), (tif(DEEP[..., 0].view(np.int16)), "signed"),
    (tif(DEEP[..., 0].astype(np.uint32)), "32 bits"),
    (tif(np.moveaxis(DEEP, -1, 0), **RGB, planarconfig="separate"), "stored apart"),
    (tif(EIGHT, **RGB)[:300], "cut off|truncated"), (tif(EIGHT, **RGB)[:60], "cut off"),
    (b"II*\0\xff\xff\xff\xff", "cut off"), (b"II*\0" + bytes(20), "TIFF")])
def test_a_tiff_that_is_no_such_image_is_named(data, line):
    with pytest.raises(BadImage, match=line):
        StoredImage(data).whole()


def entry(tag, kind, count, value):
    return struct.pack("<HHII", tag, kind, count, value)


def crafted(*entries, following=0):
    body = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", following)
    return b"II*\0" + struct.pack("<I", 8) + body


SIZE = (entry(256, 4, 1, 100), entry(257, 4, 1, 100))


@pytest.mark.parametrize(("data", "line"), [
    (crafted(entry(256, 4, 1, 60_000), entry(257, 4, 1, 60_000)), "50 megapixels"),
    (crafted(entry(256, 4, 1, 70_000), entry(257, 4, 1, 1)), "side of 70000"),
    (crafted(*SIZE, entry(258, 3, 50_000_000, 8)), "parts"),
    (crafted(*SIZE, entry(273, 4, 90_000, 8)), "beyond its end"), (crafted(*SIZE, entry(50706, 1, 4, 1)), "DNG")])
def test_a_hostile_tiff_is_refused_by_its_tags(data, line):
    with pytest.raises(BadImage, match=line):
        StoredImage(data)


def test_tags_that_all_point_to_the_whole_file_and_endless_pages_cost_nothing():
    plain = tif(EIGHT, **RGB)
    found = tiff.page(plain)
    many = [*found.entries.values(), *(entry(tag, 7, 4_000_000, 8) for tag in range(40_000, 50_000))]
    place = len(plain) + len(plain) % 2
    data = bytearray(plain + bytes(place - len(plain)))
    data[4:8] = struct.pack("<I", place)
    data += struct.pack("<H", len(many)) + b"".join(many) + struct.pack("<I", place) + bytes(4_000_000)
    began = time.process_time()
    np.testing.assert_array_equal(np.asarray(StoredImage(bytes(data)).whole()), EIGHT)
    assert time.process_time() - began < 1  # Pillow alone would take 40 GB


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_avif_is_read_and_a_cut_one_is_named():
    file = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), (200, 30, 60), np.uint8)).save(file, "AVIF", quality=100)
    stored = StoredImage(file.getvalue())
    assert (stored.format, stored.width, stored.height) == ("AVIF", 30, 20)
    assert np.abs(np.asarray(stored.whole()).astype(int) - (200, 30, 60)).max() <= 6
    with pytest.raises(BadImage):
        StoredImage(file.getvalue()[:-40]).whole()


def test_heic_is_read_where_its_package_is_and_a_cut_one_is_named():
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    heif.from_pillow(Image.fromarray(np.full((24, 32, 3), (200, 30, 60), np.uint8))).save(file, quality=100)
    stored = StoredImage(file.getvalue())
    assert (stored.format, stored.width, stored.height) == ("HEIF", 32, 24)
    assert np.abs(np.asarray(stored.whole()).astype(int) - (200, 30, 60)).max() <= 8
    with pytest.raises(BadImage):
        StoredImage(file.getvalue()[:-100]).whole()


def test_where_the_package_for_heic_is_missing_one_line_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    reading.need_heif.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'mae_jax\[heic\]'"):
        StoredImage(b"\0\0\0\x1cftypheic" + bytes(100))
    with pytest.raises(BadImage, match="HEIC"):
        StoredImage(b"\0\0\0\x1cftypheic" + bytes(100), reading=Reading(formats=COMMON))


def source(images):
    return Source(len(images), lambda i: Example(images[i]), str)


@pytest.mark.parametrize(("highest", "span"), [(255, "0,255"), (256, "0,1023"), (4000, "0,4095"), (16_383, "0,16383"),
                                               (16_384, "0,65535")])
def test_the_range_has_the_bits_of_the_largest_value(highest, span):
    images = [deep_png(np.full((2, 2), value, np.uint16)) for value in (3, highest, 20)] + [tif(EIGHT, **RGB), b"bad"]
    found, line = value_range.chosen(source(images), tiny_config().data)
    assert found == span
    assert f"auto: {span} " in line
    assert "of 3 images" in line


def test_without_deep_images_nothing_is_said():
    assert value_range.chosen(source([tif(EIGHT, **RGB)]), tiny_config().data) == ("0,65535", "")


def test_values_above_the_range_are_told_once(caplog):
    reading._tell_range.cache_clear()
    for _ in range(2):
        StoredImage(deep_png(DEEP), reading=Reading(span=(0, 4095))).whole()
    assert caplog.text.count("data.range=0,4095") == 1


@pytest.mark.parametrize("text", ["", "1", "3,1", "a,b", "1,2,3", "0,inf", "nan,3"])
def test_a_range_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=r"data\.range="):
        tiny_config({"data.range": text})


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.tif").write_bytes(tif(DEEP >> 4, **RGB))
    (tmp_path / "a.png").write_bytes(deep_png(DEEP >> 4))
    return tmp_path


def test_a_run_on_tiff_scales_by_what_auto_chose_and_stores_it(folder, caplog, tmp_path_factory):
    from mae_jax.training import run, workdir

    caplog.set_level(logging.INFO, "mae_jax")
    config = tiny_config({"data.source": "folder", "data.path": str(folder), "data.augment": "none",
                          "data.eval_split": "train"})
    begun = run.open_run(config, str(tmp_path_factory.mktemp("run")))
    assert "data.range=auto: 0,4095 (12 bits)" in caplog.text
    assert begun.config.data.range == "0,4095"
    batch = next(begun.inputs.train(0))
    assert batch["patches"].max() > 200
    workdir.record(begun.workdir, begun.config, begun.inputs)
    for file in folder.glob("*.tif"):  # other images there would decide otherwise
        file.write_bytes(tif(DEEP, **RGB))
    assert run.open_run(config, str(begun.workdir)).config.data.range == "0,4095"


def test_a_run_from_before_finds_no_tiff_in_a_folder(folder):
    data = ConfigDict({**tiny_config().data.to_dict(), "source": "folder", "path": str(folder), "eval_split": ""})
    assert registry.load(data, "train").size == 13
    data.formats = "common"
    assert registry.load(data, "train").size == 1


def test_data_of_a_run_from_before_are_opened_with_its_range(folder):
    config = tiny_config({"data.source": "folder", "data.path": str(folder), "recipe_version": 4,
                          "data.eval_split": ""})
    _, opened = with_data(configs.read_as_begun(config.copy_and_resolve_references().unlock()))
    assert opened.config.data.range == "upper"
    assert opened.train.size == 1
