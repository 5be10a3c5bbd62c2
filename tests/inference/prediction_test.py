"""What is predicted is what evaluations count; files of predictions; what has no head."""

import csv
import json

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from mae_jax.commands.export import weights
from mae_jax.data.sources import photo_mosaic, splits
from mae_jax.errors import UserError
from mae_jax.evals.segmentation import palette
from mae_jax.inference import asked, prediction, prediction_files
from mae_jax.inference.encoder import open_encoder
from mae_jax.training import loop
from tests.helpers.stored import store_images, store_run
from tests.helpers.tiny import (
    tiny_config,
    tiny_method,
    tiny_params,
    tiny_segment,
    tiny_segment_batch,
    tiny_supervised,
)

CLASSES = ("a", "b", "c")


def of_folder(folder, **more):
    return {"data.source": "folder", "data.path": str(folder), "eval.max_examples": 1000, "method.classes": 0, **more}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images `data` of three classes, three broken ones among them, and the classifier `run`."""
    folder = tmp_path_factory.mktemp("prediction")
    store_images(folder / "data", count=30, broken=3)
    config = tiny_supervised(of_folder(folder / "data"))
    params = tiny_params(tiny_supervised())
    params["head"]["kernel"] *= 20  # so that no two classes are nearly alike
    store_run(folder / "run", config, CLASSES, params)
    return folder


@pytest.fixture(scope="module")
def encoder(made):
    return open_encoder(str(made / "run"), batch_size=8)


def predict(encoder, to, images="", split="", top=2):
    part, = asked.parts_of(encoder, str(images), None, split, all_splits=False)
    score = prediction.Score(encoder)
    found = prediction.predictions(encoder, part, score, top)
    written = prediction_files.write(epath.Path(to), encoder, found, score, top, {"from": encoder.source})
    return score, written


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_figures_are_those_of_the_runs_evaluation(made, encoder, tmp_path):
    assert loop.evaluate(str(made / "run")) == 0
    lines = [json.loads(line) for line in (made / "run" / "metrics.jsonl").read_text().splitlines()]
    counted = {name.removeprefix("eval/"): value for line in lines for name, value in line.items()}
    figures = predict(encoder, tmp_path / "a.csv")[0].figures()
    assert set(figures) == {"top1", "mean_per_class"}
    assert figures == {name: counted[name] for name in figures}


def test_each_image_has_a_line_and_the_figures_follow_from_them(made, encoder, tmp_path):
    score, written = predict(encoder, tmp_path / "a.csv", made / "data", top=3)
    found = rows(tmp_path / "a.csv")
    assert [row["file"] for row in found] == sorted(row["file"] for row in found)
    assert len(found) == 93
    broken = [row for row in found if row["error"]]
    assert [row["file"] for row in broken] == [f"c/broken: {k}.png" for k in range(3)]
    assert {row["class"] for row in broken} == {""}
    good = [row for row in found if not row["error"]]
    assert [row["label"] for row in good] == [row["file"][0] for row in good]
    assert score.figures()["top1"] == np.mean([row["label"] == row["class"] for row in good])
    assert {row["class"] for row in good} > {"a"}
    for row in good:
        shares = [float(row[name]) for name in ("probability", "probability_2", "probability_3")]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert {row["class"], row["class_2"], row["class_3"]} == set(CLASSES)
    assert written == [str(tmp_path / f"a{ending}") for ending in (".csv", "_confusion.csv", "_confusion.png")]
    table = rows(tmp_path / "a_confusion.csv")
    assert [int(table[k][name]) for k, name in enumerate(CLASSES)] == [
        sum(row["label"] == row["class"] == name for row in good) for name in CLASSES]
    assert sum(int(row[name]) for row in table for name in CLASSES) == 90
    assert "3 images could not be read" in prediction.told(score)
    assert "90 images predicted; top1" in prediction.told(score)


def test_json_says_the_same_and_arrays_give_the_same(made, encoder, tmp_path):
    predict(encoder, tmp_path / "a.json", made / "data", top=2)
    said = json.loads((tmp_path / "a.json").read_text())
    assert said["from"] == str(made / "run")
    assert said["unreadable"] == 3
    assert set(said["figures"]) == {"top1", "mean_per_class"}
    chosen = [each for each in said["images"] if "error" not in each][:9]
    files = [made / "data" / each["file"] for each in chosen]
    for given in (files, [np.asarray(Image.open(file)) for file in files]):
        for mine, theirs in zip(prediction.of_images(encoder, given, top=2), chosen, strict=True):
            assert [one["class"] for one in theirs["predictions"]] == list(mine.classes)
            np.testing.assert_allclose([one["probability"] for one in theirs["predictions"]], mine.probabilities,
                                       rtol=1e-4)


def test_images_without_labels_have_no_figures(made, encoder, tmp_path):
    score, written = predict(encoder, tmp_path / "a.csv", f"{made}/data/**/0*.png")
    assert {row["label"] for row in rows(tmp_path / "a.csv")} == {"a", "b", "c"}  # their folders are called so
    file = tmp_path / "one.png"
    file.write_bytes((made / "data" / "a" / "00.png").read_bytes())
    score, written = predict(encoder, tmp_path / "a.csv", file)
    assert (score.figures(), score.confusion, written) == ({}, None, [str(tmp_path / "a.csv")])
    assert [(row["file"], row["label"]) for row in rows(tmp_path / "a.csv")] == [(str(file), "")]
    with pytest.raises(UserError, match="no image matches"):
        predict(encoder, tmp_path / "a.csv", f"{made}/data/*.gif")


def test_a_run_without_a_head_is_refused_with_what_to_do(tmp_path):
    run = store_run(tmp_path / "run", tiny_config())
    with pytest.raises(UserError, match=r"has no head: method.name=mae .* fine-tune it .* or take its features"):
        prediction.check(open_encoder(str(run)))


@pytest.mark.slow
def test_several_labels_have_probabilities_of_their_own(tmp_path):
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 2, (60, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", image=draws.integers(0, 256, (60, 20, 20, 3), dtype=np.uint8), label=labels)
    config = tiny_supervised({"data.source": "npz", "data.path": str(tmp_path / "data.npz"), "method.classes": 0,
                              "method.multi_label": True, "method.loss": "bce", "eval.max_examples": 1000})
    run = store_run(tmp_path / "run", config, ("0", "1", "2"), tiny_params(tiny_supervised()))
    encoder = open_encoder(str(run), batch_size=8)
    score, _ = predict(encoder, tmp_path / "a.json", split="train", top=3)
    said = json.loads((tmp_path / "a.json").read_text())["images"]
    sums = [sum(one["probability"] for one in each["predictions"]) for each in said]
    assert np.std(sums) > 0.01
    numbers = [int(each["file"].split("[")[1][:-1]) for each in said]
    assert [each.get("label", "") for each in said] == [
        ", ".join(str(k) for k in range(3) if labels[number, k]) for number in numbers] or len(said) < 60
    assert set(score.figures()) == {"map", "map_all"}
    loop.evaluate(str(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted = {name: value for line in lines for name, value in line.items()}
    assert predict(encoder, tmp_path / "b.json")[0].figures()["map"] == counted["eval/map"]


@pytest.mark.slow
def test_masks_are_what_the_segmentation_counts(tmp_path):
    config = tiny_segment({"data.source": "photo_mosaic", "method.classes": 17, "data.eval_split": "test[:20]",
                           "method.background": -1, "data.mask_key": "", "method.head": "probe"})
    moments = {"mean": np.linspace(-1, 1, 32, dtype=np.float32), "var": np.linspace(0.1, 2, 32, dtype=np.float32)}
    run = store_run(tmp_path / "run", config, extras={"batch_norm": moments})
    encoder = open_encoder(str(run), batch_size=8)
    score, written = predict(encoder, tmp_path / "masks")
    listed = rows(tmp_path / "masks" / "masks.csv")
    assert len(listed) == 20
    assert written == [str(tmp_path / "masks"), str(tmp_path / "masks" / "masks.csv")]
    with Image.open(tmp_path / "masks" / listed[0]["mask"]) as mask:
        assert (mask.mode, mask.size) == ("P", (16, 16))
        assert np.asarray(mask).max() < 17
        np.testing.assert_array_equal(np.reshape(mask.getpalette(), (-1, 3))[:17], palette(17)[:17])
    loop.evaluate(str(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted = {name: value for line in lines for name, value in line.items()}
    assert {f"eval/{name}": value for name, value in score.figures().items()}.items() <= counted.items()
    weights.export(str(run), str(tmp_path / "out.safetensors"), "mae_jax")  # with the batch norm folded into the head
    pixels = photo_mosaic.load(config.data, splits.parse("test")).read(0).image
    here, there = (prediction.of_images(open_encoder(str(source), batch_size=8), pixels)[0].mask
                   for source in (run, tmp_path / "out.safetensors"))
    np.testing.assert_array_equal(here, there)


@pytest.mark.slow
def test_masks_in_the_images_own_size_are_what_the_evaluation_counts_also_of_an_export(tmp_path):
    config = tiny_segment({"data.source": "photo_mosaic", "method.classes": 17, "data.eval_split": "test[:10]",
                           "method.background": -1, "data.mask_key": "", "method.head": "upernet",
                           "method.test": "slide", "method.head_width": 8, "method.aux_width": 4,
                           "method.relative_position_bias": True, "data.image_size": (24, 16)})
    method = tiny_method(config)
    _, extras = jax.jit(method.init)(jax.random.key(0), tiny_segment_batch(config))
    extras = jax.tree.map(lambda x: x + 0.5, jax.device_get(extras))  # moments that say something
    run = store_run(tmp_path / "run", config, extras=extras)
    encoder = open_encoder(str(run), batch_size=4)
    score, _ = predict(encoder, tmp_path / "masks")
    listed = rows(tmp_path / "masks" / "masks.csv")
    assert len(listed) == 10
    with Image.open(tmp_path / "masks" / listed[3]["mask"]) as mask:
        assert (mask.mode, mask.size) == ("P", (64, 64))
        wanted = np.asarray(mask)
    loop.evaluate(str(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted = {name: value for line in lines for name, value in line.items()}
    figures = {f"eval/{name}": value for name, value in score.figures().items()}
    assert figures.keys() == {f"eval/own_size/{name}" for name in ("miou", "mean_accuracy", "pixel_accuracy")}
    assert figures.items() <= counted.items()
    assert "eval/miou" in counted
    weights.export(str(run), str(tmp_path / "out.safetensors"), "mae_jax")
    pixels = photo_mosaic.load(config.data, splits.parse("test")).read(3).image
    for source in (str(run), str(tmp_path / "out.safetensors")):
        said, = prediction.of_images(open_encoder(source, batch_size=4), pixels)
        np.testing.assert_array_equal(said.mask, wanted)
    with pytest.raises(UserError, match="relative_position_bias"):
        weights.export(str(run), str(tmp_path / "timm"), "timm")


def test_a_name_does_not_lead_out_of_the_folder_of_masks(tmp_path):
    class Method:
        task, classes = "segmentation", 2

    class Encoder:
        method, classes = Method(), ("cat", "dog")

    mask = np.zeros((4, 4), np.uint8)
    found = [prediction.Prediction("../../evil.png", mask=mask), prediction.Prediction("/etc/x", mask=mask),
             prediction.Prediction("bad", error="cut")]
    prediction_files.write(epath.Path(tmp_path / "masks"), Encoder(), iter(found), None, 1, {})
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")) == [
        "masks/classes.png", "masks/etc/x.png", "masks/evil.png.png"]
    with Image.open(tmp_path / "masks" / "classes.png") as legend:
        assert {tuple(color) for color in palette(2)[:2].tolist()} <= {color for _, color in legend.getcolors(1 << 20)}
    assert rows(tmp_path / "masks" / "masks.csv")[2] == {"file": "bad", "mask": "", "error": "cut"}


@pytest.mark.parametrize(("to", "task", "line"), [
    ("a.txt", "classification", "end in .csv or .json"), ("", "classification", "end in .csv"),
    ("a.csv", "segmentation", "name a folder")])
def test_names_of_files_that_are_not_written(tmp_path, to, task, line):
    with pytest.raises(UserError, match=line):
        prediction_files.check(epath.Path(tmp_path / to), task)


def test_probabilities():
    one, other = np.array([0.0, 1000.0, 1000.0], np.float32), np.array([0.0, 1000.0, -1000.0], np.float32)
    np.testing.assert_allclose(prediction.probabilities(one, independent=False), [0, 0.5, 0.5])
    np.testing.assert_allclose(prediction.probabilities(other, independent=True), [0.5, 1, 0])


def test_several_labels_have_the_names_of_the_data_and_not_of_the_encoder(encoder):
    fields = {"labels": np.array([[0, 1, 1, 0]], np.uint8)}
    found = prediction._prediction(encoder, "x.png", np.array([1.0, 3.0, 2.0]), fields, 0, 1, "", ("p", "q", "r", "s"))
    assert (found.label, found.classes) == ("q, r", ("b",))


def test_an_image_that_cannot_be_read_keeps_its_label(encoder):
    found = prediction._prediction(encoder, "x.png", np.zeros(3), {"label": np.array([2])}, 0, 1, "broken")
    assert (found.label, found.error, found.classes) == ("c", "broken", ())


def test_numbers_in_place_of_unknown_names_are_no_labels(made, tmp_path):
    config = tiny_supervised(of_folder(made / "data"))
    run = store_run(tmp_path / "run", config, ("x",), tiny_params(tiny_supervised()))  # names of another number
    encoder = open_encoder(str(run), batch_size=8)
    assert (encoder.classes, encoder.class_names) == (("0", "1", "2"), ())
    store_images(tmp_path / "data", ("0", "1"), 1)
    part, = asked.parts_of(encoder, str(tmp_path / "data"), None, "", all_splits=False)
    score = prediction.Score(encoder)
    assert [each.label for each in prediction.predictions(encoder, part, score, 1)] == ["", ""]
    assert score.figures() == {}
