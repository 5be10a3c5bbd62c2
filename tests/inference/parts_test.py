"""Which images are meant by a path, a pattern or a config, and which labels they have."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mae_jax.errors import UserError
from mae_jax.inference import asked
from mae_jax.inference.parts import IMAGES, of_config, of_images
from tests.helpers.stored import store_images
from tests.helpers.tiny import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = store_images(tmp_path_factory.mktemp("parts") / "data", ("cat", "dog"), count=2)
    (folder / "dog" / "@eaDir").mkdir()
    (folder / "dog" / "@eaDir" / "00.png").write_bytes(b"a thumbnail")
    (folder / "dog" / "inside").mkdir()
    (folder / "dog" / "inside" / "9.png").write_bytes((folder / "dog" / "00.png").read_bytes())
    (folder / "[1].png").write_bytes((folder / "dog" / "00.png").read_bytes())
    return folder


def seen(part):
    return [(part.name(k), part.source.label(k)) for k in range(part.size)]


def test_a_folder_means_all_images_under_it(folder):
    part = of_images(tiny_config(), str(folder), ("bird", "dog"))
    assert (part.split, part.source.classes) == (IMAGES, ("bird", "dog"))
    assert seen(part) == [("[1].png", -1), ("cat/00.png", -1), ("cat/01.png", -1), ("dog/00.png", 1), ("dog/01.png", 1),
                          ("dog/inside/9.png", 1)]


def test_without_known_classes_the_folders_at_the_top_are_those_if_all_images_lie_in_one(folder):
    assert of_images(tiny_config(), str(folder), ()).source.classes == ()
    assert of_images(tiny_config(), str(folder / "dog"), ()).source.classes == ()
    whole = store_images(folder.parent / "whole", ("cat", "dog"), count=1)
    assert seen(of_images(tiny_config(), str(whole), ())) == [("cat/00.png", 0), ("dog/00.png", 1)]


@pytest.mark.parametrize(("pattern", "names"), [
    ("*/00.png", ["cat/00.png", "dog/00.png"]), ("**/9.png", ["dog/inside/9.png"]), ("[1].png", ["[1].png"]),
    ("dog/0?.png", ["dog/00.png", "dog/01.png"])])
def test_a_pattern_or_a_file_is_named_as_it_was_given(folder, pattern, names):
    part = of_images(tiny_config(), f"{folder}/{pattern}", ("dog",))
    assert [part.name(k) for k in range(part.size)] == [f"{folder}/{name}" for name in names]
    assert [part.source.label(k) for k in range(part.size)] == [0 if "/dog" in f"/{name}" else -1 for name in names]


def test_folders_far_above_a_pattern_are_no_labels(tmp_path):
    data = store_images(tmp_path / "dog" / "sorted", ("cat", "dog"), count=1)
    classes = ("cat", "dog")
    for pattern, label in ((f"{data}/**/*.png", 0), (f"{data}/cat/*.png", 0), (f"{data}/cat/00.png", 0)):
        part = of_images(tiny_config(), pattern, classes)
        assert part.source.label(0) == label
    (data / "00.png").write_bytes((data / "cat" / "00.png").read_bytes())
    assert of_images(tiny_config(), f"{data}/*.png", classes).source.label(0) == -1


@pytest.mark.parametrize(("span", "highest", "bits"), [
    ("0,65535", 3504, 12), ("auto", 3504, 12), ("upper", 3504, 12), ("0,65535", 16_000, 14), ("0,65535", 40_000, 0),
    ("0,4095", 3504, 0), ("0,65535", 0, 0)])
def test_deep_images_that_the_encoder_would_see_dark_are_told(tmp_path, caplog, span, highest, bits):
    """An encoder of 8-bit images has the range of 16 bits, in which those of 12 bits are nearly black."""
    pixels = np.full((9, 8), highest, np.uint16 if highest else np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    config = tiny_config({"data.range": span})
    encoder = SimpleNamespace(config=config, class_names=(), of_run=True, source="runs/a")
    asked.parts_of(encoder, str(tmp_path), None, "", all_splits=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * bool(bits)
    assert not bits or f"--config.data.range=0,{2**bits - 1}" in caplog.text
    given = tiny_config({"data.source": "folder", "data.path": str(tmp_path), "data.range": f"0,{2**12 - 1}",
                         "data.eval_split": ""})
    caplog.clear()
    asked.parts_of(encoder, "", given, "", all_splits=True)
    assert not caplog.records


def test_what_holds_no_image_is_refused(folder, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for images, line in ((f"{folder}/*.gif", "no image matches"), (str(tmp_path), "no images"),
                         ("", "no image matches"), ("s3://bucket/a", "local or gs://")):
        with pytest.raises(UserError, match=line):
            of_images(tiny_config(), images, ())


def test_splits_of_a_config(folder):
    config = tiny_config({"data.source": "npz", "data.path": str(folder.parent / "a.npz")})
    np.savez(folder.parent / "a.npz", x_train=np.zeros((9, 8, 8), np.uint8), x_test=np.zeros((4, 8, 8), np.uint8))
    whole = of_config(config, None, "", all_splits=True)
    assert [(part.split, part.size) for part in whole] == [("train", 9), ("test", 4)]
    assert [part.split for part in of_config(config, None, "", all_splits=False)] == ["test"]
    assert [part.size for part in of_config(config, None, "train[:3]", all_splits=True)] == [3]
    config.unlock()
    config.data.eval_split = ""
    assert [part.split for part in of_config(config, None, "", all_splits=False)] == ["train"]
    config.data.source = "batches"
    with pytest.raises(UserError, match="without names of images"):
        of_config(config, None, "", all_splits=True)
