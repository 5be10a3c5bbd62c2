"""What a detector finds in files: in pixels of each, as JSON and as PNGs."""

import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mae_jax.errors import UserError
from mae_jax.inference import asked, prediction, prediction_files
from mae_jax.inference.encoder import open_encoder
from tests.helpers.stored import store_run
from tests.helpers.tiny import tiny_config, tiny_params

CLASSES = ("ball", "cup", "kite")
SIZES = {"a/wide.png": (20, 40), "b/tall.png": (64, 24)}  # height, width


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images `data` of two sizes and one that is broken, and what a detector `run` says of them in `found`."""
    folder = tmp_path_factory.mktemp("detection")
    draws = np.random.default_rng(0)
    for name, size in SIZES.items():
        (folder / "data" / name).parent.mkdir(parents=True)
        Image.fromarray(draws.integers(256, size=(*size, 3), dtype=np.uint8)).save(folder / "data" / name)
    (folder / "data" / "a" / "broken.png").write_bytes(b"no image")
    config = tiny_config({"method.score": 0.1, "eval.crop_ratio": (1.0,), "data.augment": "none"}, "detection")
    store_run(folder / "run", config, CLASSES, tiny_params(config))
    encoder = open_encoder(str(folder / "run"), batch_size=8)
    part, = asked.parts_of(encoder, str(folder / "data"), None, "", all_splits=False)
    score, to = prediction.Score(encoder), epath.Path(folder / "found")
    prediction_files.check(to, "detection")
    written = prediction_files.write(to, encoder, prediction.predictions(encoder, part, score), score, 5, {"from": "x"})
    assert written == [str(to / "detections.json")]
    assert (score.images, score.unreadable_count) == (2, 1)
    return folder, encoder


def test_boxes_and_masks_are_in_pixels_of_each_image(made):
    said = json.loads((made[0] / "found" / "detections.json").read_text())
    assert said["unreadable"] == 1
    found = {each["file"]: each for each in said["images"]}
    assert found.keys() == {*SIZES, "a/broken.png"}
    assert "error" in found["a/broken.png"]
    for name, (height, width) in SIZES.items():
        assert found[name]["size"] == [height, width]
        objects = found[name]["objects"]
        assert objects
        for each in objects:
            x, y, across, down = each["bbox"]
            assert x >= 0
            assert y >= 0
            assert x + across <= width + 0.01
            assert y + down <= height + 0.01
            assert each["class"] in CLASSES
            assert 0.1 < each["score"] <= 1
            assert each["segmentation"]["size"] == [height, width]
        # One that is as wide as the image: the canvas was scaled back by each axis.
        assert max(each["bbox"][0] + each["bbox"][2] for each in objects) > width / 2
    scores = [each["score"] for each in found["a/wide.png"]["objects"]]
    assert scores == sorted(scores, reverse=True)


def test_each_image_that_can_be_read_is_drawn(made):
    drawn = {path.relative_to(made[0] / "found").as_posix() for path in (made[0] / "found").rglob("*.png")}
    assert drawn == {f"{name}.png" for name in SIZES}


@pytest.mark.parametrize(("name", "refused"), [("a.json", False), ("folder", False), ("a.csv", True), ("a.png", True)])
def test_what_is_written_is_json_or_a_folder(name, refused, tmp_path):
    if not refused:
        prediction_files.check(epath.Path(tmp_path / name), "detection")
        return
    with pytest.raises(UserError, match=r"a file \*\.json, or to a folder"):
        prediction_files.check(epath.Path(tmp_path / name), "detection")


def test_arrays_are_refused_in_one_line(made):
    with pytest.raises(UserError, match="takes files only"):
        prediction.of_images(made[1], np.zeros((8, 8, 3), np.uint8))
