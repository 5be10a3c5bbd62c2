"""The evaluation of detectors on data in COCO's format, by a method that knows the truth, and moves it."""

import json

import numpy as np
import pytest

from mae_jax.data import rle
from mae_jax.data.sources import coco, coco_annotations, coco_files
from mae_jax.evals import detected, input_grid, object_figures
from mae_jax.evals.average_precision import FIGURES, Found, Mask
from mae_jax.ops.detection.instance_masks import paste
from mae_jax.training.evaluation import known_mode
from tests.helpers import coco_data
from tests.helpers.coco_data import SIZE, square
from tests.helpers.detected import ellipse
from tests.helpers.oracle import IMAGES, made, write


@pytest.fixture
def root(tmp_path):
    for cached in (coco_files.layout, coco_annotations.read, coco._files):
        cached.cache_clear()
    write(tmp_path)
    return tmp_path


def test_what_is_found_where_it_is_has_one(root):
    evaluator, state = made(root, 0.0)
    figures = evaluator.scalars(state)
    for kind in ("box", "mask"):
        assert figures[f"eval/{kind}_ap"] == figures[f"eval/{kind}_ap50"] == figures[f"eval/{kind}_ap_small"] == 1
        assert np.isnan(figures[f"eval/{kind}_ap_large"])
    assert figures["eval/crowded"] == 2
    assert sorted(figures) == sorted(f"eval/{name}" for name in evaluator.metric_names(state))


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_figures_are_of_every_image_once_whatever_the_batch(root, batch):
    evaluator, state = made(root, 0.2, batch)
    figures = evaluator.scalars(state)
    assert figures["eval/box_ap"] == pytest.approx(0.4)  # an overlap of 0.667
    assert figures["eval/box_ap50"] == 1
    assert figures["eval/box_ap75"] == 0
    assert figures["eval/mask_ap50"] == 1
    assert len(evaluator.notes["detection"]) == IMAGES


def test_images_that_cannot_be_read_do_not_count_and_are_told(root, caplog):
    (root / "val2017" / "1.png").write_bytes(b"no image")
    evaluator, state = made(root, 0.0)
    assert evaluator.scalars(state)["eval/box_ap"] == 1
    assert f"1 of {IMAGES} images cannot be read" in caplog.text
    assert len(evaluator.notes["detection"]) == IMAGES - 1


def test_results_are_those_of_coco(root):
    evaluator, state = made(root, 0.0)
    assert list(evaluator.files(state)) == []
    evaluator.scalars(state)
    (name, text), = evaluator.files(state)
    results = json.loads(text)
    assert name == "detections_eval.json"
    assert len(results) == 2 * (IMAGES - 1)
    assert {result["image_id"] for result in results} == set(range(70, 70 + IMAGES - 1))
    assert {result["category_id"] for result in results} == {1, 90}
    first = results[0]
    assert first["bbox"] == [4.0, 6.0, 14.0, 14.0]
    assert first["score"] == 0.9
    size = tuple(first["segmentation"]["size"])
    assert size == SIZE
    mask = rle.decoded(rle.runs(first["segmentation"]["counts"], size), size)
    expected = np.zeros(SIZE, bool)
    expected[6:20, 4:18] = True
    np.testing.assert_array_equal(mask, expected)


def test_boxes_alone_have_no_figures_of_masks(root):
    coco_data.write(root / "annotations" / "instances_val2017.json", {70: "0.png"},
                    [square(1, 70, 4, 6, 14, segmentation=[])])
    evaluator, state = made(root, 0.0)
    figures = evaluator.scalars(state)
    assert figures["eval/box_ap"] == pytest.approx(1)
    assert "eval/mask_ap" not in figures


def test_a_figure_has_truth_beside_what_was_found(root):
    evaluator, state = made(root, 0.1)
    evaluator.scalars(state)
    (name, figure), = evaluator.images(state)
    assert name == "detection"
    assert figure.dtype == np.uint8
    for label in (0, 2):
        assert (np.abs(figure.astype(int) - object_figures.color(label)).sum(-1) == 0).sum() > 200  # lines of boxes


@pytest.mark.parametrize("metric", ["box_ap", "mask_ap75", "box_ap_small"])
def test_a_higher_precision_is_better(metric):
    assert known_mode(metric) == "max"
    assert metric.split("_", 1)[1] in FIGURES


def test_a_mask_is_pasted_into_its_part_of_the_image_alone():
    rng = np.random.default_rng(0)
    for _ in range(40):
        corner, side = rng.uniform(-10, 40, 2), rng.uniform(0.2, 40, 2)
        box, mask = np.concatenate([corner, corner + side]), rng.random((28, 28)).astype(np.float32).round(1)
        whole = detected.pasted(mask, box, (37, 45)).whole()
        np.testing.assert_array_equal(whole, paste(mask, box, (37, 45)))


def test_panels_draw_boxes_masks_and_scores():
    image, box = np.zeros((40, 60, 3), np.uint8), np.array([[30.0, 20, 90, 80]])
    found = Found(box, np.array([1]), (ellipse(box[0]),), np.array([0.5]))
    drawn = object_figures.panel(image, found, ("cat", "dog"), (150, 180))
    assert min(drawn.shape[:2]) >= object_figures.LEAST
    hue = np.array(object_figures.color(1))
    scale = drawn.shape[1] / 180
    inside = drawn[int(50 * scale), int(60 * scale)]
    assert np.abs(inside - object_figures.SHARE * hue).max() < 2
    none = object_figures.panel(image, found._replace(score=np.array([object_figures.SHOWN - 0.01])), (), (150, 180))
    assert not none.any()
    assert isinstance(found.masks[0], Mask)


def test_a_grid_of_a_batch_shows_its_objects():
    batch = {"box": np.array([[[4, 6, 20, 22], [0, 0, 0, 0]]], np.float32), "box_class": np.array([[2, 0]], np.int32),
             "box_valid": np.array([[1, 0]], np.float32), "box_mask": np.zeros((1, 2, 1568), np.uint8)}
    batch["box_mask"][0, 0] = np.packbits(np.arange(112)[:, None] < 56 + np.zeros(112))
    drawn = object_figures.with_objects(np.zeros((1, 32, 32, 3), np.uint8), batch)[0].astype(int)
    hue = np.array(object_figures.color(2))
    assert (drawn[6, 4:20] == hue).all()
    assert np.abs(drawn[10, 10] - object_figures.SHARE * hue).max() < 2
    assert not drawn[18, 10].any()
    assert not drawn[:, 24:].any()
    assert object_figures.object_names(batch, 0, ("a", "b", "c")) == "c"


def test_the_grid_of_the_first_batch_shows_images_with_and_without_their_objects(root):
    evaluator, _ = made(root, 0.0)
    batch = next(iter(evaluator.inputs.evaluate()))
    captions = [input_grid.caption(batch, i, ("cat", "dog", "kite"), evaluator.inputs.parts["val"]) for i in range(4)]
    assert captions[0] == ("0.png", "cat, kite")
    drawn = input_grid.drawn(evaluator.method, batch, captions, "")
    plain = input_grid.drawn(evaluator.method, {name: value for name, value in batch.items() if name != "box"},
                             captions, "")
    assert drawn.shape[1] == plain.shape[1]
    assert drawn.shape[0] - plain.shape[0] > 90  # one more panel, as high as the canvas
    assert (drawn == object_figures.color(2)).all(-1).sum() > 50


def test_slivers_at_the_edges_are_drawn():
    batch = {"box": np.array([[[31.6, 4, 32, 9], [4, 31.7, 9, 32]]], np.float32),
             "box_class": np.zeros((1, 2), np.int32), "box_valid": np.ones((1, 2), np.float32),
             "box_mask": np.full((1, 2, 1568), 255, np.uint8)}
    drawn = object_figures.with_objects(np.zeros((1, 32, 32, 3), np.uint8), batch)[0]
    assert drawn[5, 31].any()
    assert drawn[31, 5].any()


def test_panels_of_long_images_are_bounded():
    found = Found(np.zeros((0, 4)), np.zeros(0, np.int64))
    for shape in ((10, 2000), (1, 10_000), (3000, 2000)):
        assert max(object_figures.panel(np.zeros((*shape, 3), np.uint8), found, (), shape).shape) <= object_figures.MOST
