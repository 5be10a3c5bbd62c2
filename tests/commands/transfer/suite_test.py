"""A suite on a tiny encoder: what runs, what is reported, what fails, what is skipped, and what a signal does."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mae_jax.commands.transfer.protocols import Recipe, plan
from mae_jax.commands.transfer.report import Cell, Row, table
from mae_jax.commands.transfer.suite import Suite, encoder_config, measured, rates
from mae_jax.config import default
from mae_jax.errors import UserError
from mae_jax.evals import linear_probe
from mae_jax.storage import safetensors_file
from mae_jax.storage.checkpoint import Checkpoints, load_params
from mae_jax.training import loop, step_logger, warm_shape, workdir
from mae_jax.training import run as training_run
from tests.helpers.tiny import tiny_config, tiny_state

RECIPE = """
from mae_jax.config import default, resolve

def get_config(arg=""):
    config = default("supervised")
    config.batch_size = 8
    config.data.update(image_size=(16, 16), threads=2, train_split="train[:64]", eval_split="test[:32]")
    config.model.update(width=64, depth=4, heads=4, patch=(8, 8))
    config.optim.update(lr=0.05, warmup="1 steps")
    config.train.duration = config.eval.every = config.checkpoint.every = "4 steps"
    config.log.update(every="1 steps", tensorboard=False)
    config.eval.max_examples = 32
    return resolve(config, arg, crops=lambda config: None, more=more, absent=absent, linear=linear, held=held)

def metric(arg):
    return "mean_per_class" if "more" in arg else "top1"

def more(config):
    config.data.train_split = "train[64:128]"

def absent(config):
    config.data.update(source="folder", path="/no/such/folder")

def linear(config):
    config.method.train_blocks = 0

def held(config):
    config.data.update(val_split="train[64:96]", eval_split="")
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """The workdir of a tiny MAE of 3 steps."""
    folder = tmp_path_factory.mktemp("encoder")
    config = tiny_config({"train.duration": "3 steps", "data.eval_split": "", "optim.lr": 1e-3})
    workdir.record(epath.Path(folder), config)
    checkpoints = Checkpoints(folder, 2)
    checkpoints.save(3, tiny_state(config)._replace(step=np.int32(3)))
    checkpoints.close()
    return folder


def suite(tmp_path: Path, source: Path, overrides: dict | None = None, lrs=()) -> Suite:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    return Suite(Recipe(str(file), overrides or {}), str(source), str(tmp_path / "out"), list(lrs))


def results(tmp_path: Path) -> list[dict]:
    return json.loads((tmp_path / "out" / "results.json").read_text())["results"]


def test_a_cell_takes_the_shape_of_the_encoder_and_the_overrides_of_the_command_line(tmp_path, encoder):
    some = suite(tmp_path, encoder, overrides={"optim.lr": 0.5, "train.duration": "9 steps"})
    config = some.config(Cell("more", "linear"))
    assert (config.model.width, config.model.depth, config.model.patch) == (32, 2, (4, 4))
    assert (config.optim.lr, config.train.duration) == (0.5, "9 steps")
    assert config.init_from == str(encoder / "checkpoints" / "3")
    assert (config.data.train_split, config.method.train_blocks) == ("train[64:128]", 0)
    assert some.config(Cell("more", blocks="0.5")).method.train_blocks == 0.5
    assert some.config(Cell("more", blocks="all")).method.train_blocks == -1
    probe = some.config(Cell("more", "quick"))
    assert (probe.method.name, probe.data.train_split, probe.batch_size) == ("mae", "train[64:128]", 8)
    with pytest.raises(UserError, match=r"'mor'.* 'more'"):
        some.config(Cell("mor"))


def test_the_shape_is_known_from_an_export_and_from_one_step_but_not_from_a_foreign_file(tmp_path, encoder):
    file = tmp_path / "encoder.safetensors"
    stored = {"config": json.dumps(encoder_config(str(encoder)).to_dict())}
    safetensors_file.save(file, load_params(encoder), stored)  # as mae_jax export does it
    for source in (encoder, encoder / "checkpoints" / "3", file):
        assert encoder_config(str(source)).model.width == 32
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    for path in (foreign, tmp_path / "missing.safetensors"):
        with pytest.raises((UserError, OSError), match=r"foreign\.safetensors .*workdir|missing"):
            encoder_config(str(path))


def test_a_grid_has_all_numbers_of_blocks_where_they_mean_something(tmp_path, encoder):
    some = suite(tmp_path, encoder)
    cells, _ = plan(some.recipe, ["crops", "more"], ["", "linear", "quick"], ["0", "0.5", "all"])
    assert [cell.folder for cell in cells[:5]] == ["crops_blocks_0", "crops_blocks_0.5", "crops_blocks_all",
                                                   "crops_linear", "crops_quick"]
    assert len(cells) == 10
    assert plan(some.recipe, [], [], [])[0] == [Cell("mine")]
    assert plan(some.recipe, ["crops", "crops"], [], [])[0] == [Cell("crops")]
    for wrong in ("some", "-1", "1.5", "nan", ""):
        with pytest.raises(UserError, match=r"--blocks: .*whole numbers"):
            plan(some.recipe, ["crops"], [], [wrong])


def test_dense_protocols_are_recipes_with_data_and_sizes_of_images_of_their_own(tmp_path, encoder):
    some = suite(tmp_path, encoder, overrides={"train.duration": "9 steps"})
    detect = some.config(Cell("coco=/data/mine", "detect:benchmarking_b:25"))
    assert (detect.method.name, detect.data.source, detect.data.path) == ("detection", "coco", "/data/mine")
    assert (detect.data.image_size, detect.data.eval_split, detect.method.window) == ((1024, 1024), "val", 16)
    assert (detect.train.duration, detect.init_from) == ("9 steps", str(encoder / "checkpoints" / "3"))
    upernet = some.config(Cell("ade20k=/data/ade", "upernet:ibot"))
    assert (upernet.data.path, upernet.data.mask_key) == ("/data/ade/images", "/data/ade/annotations")
    assert (upernet.method.encoder_norm, upernet.data.image_size) == (True, (512, 512))
    assert warm_shape.with_shape(upernet).model.width == 32
    assert some.config(Cell("mosaic", "segment")).data.image_size == (40, 40)
    assert some.config(Cell("digit_scenes", "detect"), "held").data.val_split == "train[90%:]"
    assert some._metrics(Cell("digit_scenes", "detect")) == ("box_ap", "mask_ap")
    assert some._metrics(Cell("mosaic", "upernet")) == ("own_size/miou",)
    other = suite(tmp_path, encoder, overrides={"method.mixup": 0.8})
    assert other.config(Cell("crops")).method.mixup == 0.8
    with pytest.raises(UserError, match=r"method\.mixup: the recipe detect has no such field"):
        other.config(Cell("digit_scenes", "detect"))


def test_a_data_set_is_left_out_of_protocols_that_it_does_not_fit_and_a_misspelt_one_stops_all(tmp_path, encoder):
    recipe = suite(tmp_path, encoder).recipe
    cells, left_out = plan(recipe, ["crops", "digit_scenes", "coco=/a/b"], ["linear", "detect", "detect:vitdet_b"], [])
    assert [cell.folder for cell in cells] == ["crops_linear", "digit_scenes_detect", "digit_scenes_detect_vitdet_b",
                                               "coco-b_detect", "coco-b_detect_vitdet_b"]
    assert [(row.cell.data, row.cell.protocol) for row in left_out] == [
        ("crops", "detect"), ("crops", "detect:vitdet_b"), ("digit_scenes", "linear"), ("coco=/a/b", "linear")]
    assert "digit_scenes is no data set of linear" in table(left_out)
    for names, protocols, wrong in ((["crops", "digit_scene"], ["linear", "detect"], "'digit_scene'"),
                                    (["crops"], ["linear", "linea"], "'linea'"),
                                    (["digit_scenes"], ["detect:vitdet"], "'vitdet'")):
        with pytest.raises(UserError, match=f"unknown config argument {wrong}"):
            plan(recipe, names, protocols, [])
    with pytest.raises(UserError, match="coco-b_detect"):
        plan(recipe, ["coco=/a/b", "coco=/c/b/"], ["detect"], [])
    assert plan(recipe, [], ["detect"], [])[0] == [Cell("detect", "detect")]


@pytest.mark.slow
def test_detection_and_segmentation_are_in_one_table_with_probes_and_the_same_command_goes_on(tmp_path, encoder):
    pytest.importorskip("mlxtend")
    overrides = {"train.duration": "2 steps", "optim.warmup": "1 steps", "eval.every": "2 steps", "batch_size": 4,
                 "checkpoint.every": "2 steps", "eval.max_examples": 8}
    some = suite(tmp_path, encoder, overrides)
    cells, left_out = plan(some.recipe, ["crops", "digit_scenes", "mosaic"], ["quick", "detect", "upernet"], [])
    some.check(cells)
    for _ in range(2):
        assert some.run(cells, left_out) == 0
        found = {(row["data"], row["protocol"], row["metric"]): row for row in results(tmp_path) if row["fits"]}
        assert set(found) == {("digit_scenes", "detect", "box_ap"), ("digit_scenes", "detect", "mask_ap"),
                              ("mosaic", "upernet", "own_size/miou"), *(
                                  ("crops", "quick", f"{name}/top1") for name in ("linear", "sgd", "knn"))}
        assert sum(not row["fits"] for row in results(tmp_path)) == 6
        for folder, metric in (("digit_scenes_detect", "box_ap"), ("mosaic_upernet", "own_size/miou")):
            text = (tmp_path / "out" / folder / "metrics.jsonl").read_text()
            own = [json.loads(line) for line in text.splitlines()]
            row = next(row for (_, protocol, name), row in found.items() if (protocol, name) == (
                folder.rpartition("_")[2], metric))
            assert row["value"] == own[-1][f"eval/{metric}"]
            assert sum("train/loss" in line for line in own) <= 2
    assert (tmp_path / "out" / "transfer.png").exists()


@pytest.mark.slow
def test_a_suite_reports_every_cell_names_what_failed_and_skips_what_is_done(tmp_path, encoder, capsys):
    some = suite(tmp_path, encoder)
    cells, _ = plan(some.recipe, ["crops", "absent", "more"], ["", "quick"], [])
    assert some.run(cells) == 2
    out = capsys.readouterr().out
    found = {(row["data"], row["protocol"], row["metric"]): row for row in results(tmp_path)}
    assert len(found) == 10
    for name, metric in (("crops", "top1"), ("more", "mean_per_class")):
        lines = [json.loads(line) for line in (tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines()]
        assert found[name, "", metric]["value"] == lines[-1][f"eval/{metric}"]
        assert (found[name, "", metric]["step"], lines[-1]["step"]) == (4, 4)
        assert found[name, "quick", "knn/top1"]["step"] == 0
    for protocol in ("", "quick"):
        assert "/no/such/folder" in found["absent", protocol, ""]["problem"]
    assert table([Row(Cell(**{k: row.pop(k) for k in ("data", "protocol", "blocks")}), **row)
                  for row in results(tmp_path)]) in out
    assert "mean of 2" in out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("metrics.jsonl")}
    assert len(before) == 4
    assert some.run(cells) == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.fixture
def probed(monkeypatch) -> list[tuple]:
    """A list of what each linear probe is fitted to and measured on: the counts of it may hang on near ties."""
    pairs, top1 = [], linear_probe.top1

    def measuring(train, test, classes):
        pairs.append((*train, *test))
        return top1(train, test, classes)

    monkeypatch.setattr(linear_probe, "top1", measuring)
    return pairs


def assert_same(pairs: tuple, others: tuple) -> None:
    """Features of a probe are alike, and their labels the same."""
    for some, theirs in zip(pairs, others, strict=True):
        np.testing.assert_allclose(some, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_quick_protocol_measures_what_an_evaluation_of_the_encoder_measures(tmp_path, encoder, probed):
    some = suite(tmp_path, encoder)
    assert some.run([Cell("crops", "quick")]) == 0
    again = some.config(Cell("crops", "quick")).copy_and_resolve_references()
    again.unlock()
    again.init_from = ""
    folder = tmp_path / "again"
    folder.mkdir()
    os.symlink(encoder / "checkpoints", folder / "checkpoints")
    (folder / "config.json").write_text(json.dumps({"config": again.to_dict()}))
    assert loop.evaluate(str(folder)) == 0
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    found = {row["metric"]: row["value"] for row in results(tmp_path)}
    assert found.pop("sgd/top1") > 1 / 17
    assert found.keys() == {"linear/top1", "knn/top1"} <= {name.removeprefix("eval/") for name in line}
    quick, evaluated = probed[0], next(pair for pair in probed[1:] if pair[0].shape == probed[0][0].shape)
    assert_same(quick, evaluated)


@pytest.mark.slow
def test_the_quick_protocol_probes_the_encoder_of_any_method(tmp_path, encoder, probed):
    found = {}
    for method in ("mae", "supervised", "segment", "splitmask", "beit", "dino"):
        config = encoder_config(str(encoder)).copy_and_resolve_references().unlock()
        if method != "mae":
            config.method = default(method).method
        if method == "beit":
            config.method.masked = 10
        if method == "dino":
            config.method.update(out_dim=32, head_width=16, local_views=1, local_size=(8, 8))
        if method == "supervised":
            config.method.update(classes=3, multi_label=True, loss="bce")  # of other data than those probed
        stored = {"config": json.dumps(config.to_dict())}
        file = tmp_path / f"{method}.safetensors"
        params = load_params(encoder)
        # Decoders of other methods have other shapes.
        alone = method in ("splitmask", "beit", "dino")
        safetensors_file.save(file, {"encoder": params["encoder"]} if alone else params, stored)
        (tmp_path / method).mkdir()
        assert suite(tmp_path / method, file).run([Cell("crops", "quick")]) == 0
        found[method] = {row["metric"]: row["value"] for row in results(tmp_path / method)}
    assert all(set(figures) == {"linear/top1", "sgd/top1", "knn/top1"} for figures in found.values())
    for pair in probed[1:]:
        assert_same(pair, probed[0])
    assert len(probed) == len(found)


@pytest.mark.slow
def test_a_signal_stops_the_whole_suite_and_the_same_command_goes_on(tmp_path, encoder, monkeypatch):
    some = suite(tmp_path, encoder)
    cells, _ = plan(some.recipe, ["crops", "more"], [], [])
    real = step_logger.StepLogger.record

    def push(self, done, metrics, ids):
        if done == 2 and self.run.config.data.train_split == "train[64:128]":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # the thread that waits for signals shall see it before the last steps are over
            monkeypatch.setattr(step_logger.StepLogger, "record", real)
        real(self, done, metrics, ids)

    monkeypatch.setattr(step_logger.StepLogger, "record", push)
    assert some.run([*cells, Cell("absent")]) == 75
    assert [row["data"] for row in results(tmp_path)] == ["crops"]
    assert not (tmp_path / "out" / "more" / "DONE").exists()
    assert some.run(cells) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "more" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_learning_rate_is_chosen_without_the_test_data_and_then_trained_as_the_recipe_says(tmp_path, encoder):
    some = suite(tmp_path, encoder, lrs=[1e-9, 0.05])
    assert some.run([Cell("crops")]) == 0
    (row,) = results(tmp_path)
    scores = {}
    for lr in (1e-9, 0.05):
        folder = tmp_path / "out" / "crops" / f"lr_{lr:g}"
        text = (folder / "metrics.jsonl").read_text()
        assert "eval/" not in text
        scores[lr] = measured(epath.Path(folder), "top1", "val")[1]
    assert row["lr"] == max(scores, key=scores.get)
    chosen = json.loads((tmp_path / "out" / "crops" / "config.json").read_text())["config"]
    assert (chosen["optim"]["lr"], chosen["data"]["val_split"]) == (row["lr"], "")


@pytest.mark.slow
def test_a_learning_rate_that_diverges_is_out_and_the_others_are_compared(tmp_path, encoder, capsys):
    overrides = {"guard.max_nonfinite": 1}
    assert suite(tmp_path, encoder, overrides, lrs=[1e30, 0.05]).run([Cell("crops")]) == 0
    assert "crops: lr 1e+30: " in capsys.readouterr().out
    assert [row["lr"] for row in results(tmp_path)] == [0.05]
    (tmp_path / "none").mkdir()
    assert suite(tmp_path / "none", encoder, overrides, lrs=[1e30]).run([Cell("crops")]) == 3


def test_a_recipe_takes_the_values_of_the_encoders_size_and_the_command_line_has_the_last_word(tmp_path, encoder):
    theirs = encoder_config(str(encoder)).copy_and_resolve_references().unlock()
    theirs.model.update(width=1024, depth=24, heads=16, positions="learned")
    transfer = Recipe("configs/transfer.py", {"data.image_size": (96, 96)})
    config = transfer.config("dtd", encoder=theirs)
    assert (config.optim.layer_decay, config.model.width, config.data.image_size) == (0.75, 1024, (96, 96))
    config = Recipe("configs/transfer.py", {}).config("dtd", "linear", encoder=theirs)
    assert (config.data.image_size, config.model.positions) == (theirs.data.image_size, "learned")
    with pytest.raises(UserError, match=r"argument B .* L"):
        Recipe("configs/transfer.py:B", {}).config("dtd", encoder=theirs)


@pytest.mark.slow
def test_another_state_of_the_encoder_or_another_evaluation_is_not_taken_for_what_was_measured(tmp_path, encoder):
    copy = tmp_path / "copy"
    shutil.copytree(encoder, copy)
    assert suite(tmp_path, copy, {"eval.max_examples": 16}).run([Cell("crops", "quick")]) == 0
    few = results(tmp_path)
    assert suite(tmp_path, copy, {"eval.max_examples": 32}).run([Cell("crops", "quick")]) == 0
    assert results(tmp_path) != few
    shutil.copytree(copy / "checkpoints" / "3", copy / "checkpoints" / "4")
    assert suite(tmp_path, copy, {"eval.max_examples": 32}).run([Cell("crops", "quick")]) == 2
    assert "init_from" in results(tmp_path)[0]["problem"]


@pytest.mark.slow
def test_a_learning_rate_is_chosen_without_the_test_pictures_of_data_without_splits(tmp_path, encoder, monkeypatch):
    pictures = np.random.default_rng(0).integers(0, 256, (120, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "all.npz", image=pictures, label=np.arange(120) % 3)
    overrides = {"data.source": "npz", "data.path": str(tmp_path / "all.npz"), "data.train_split": "train[:80%]",
                 "data.val_split": "train[80%:]", "data.eval_split": "test"}
    seen = []
    real = training_run.prepare

    def prepare(*args):
        run = real(*args)
        seen.append([{int(i) for batch in part() for i in batch["id"][batch["valid"] > 0]}
                     for part in (run.inputs.support, run.inputs.validate, run.inputs.evaluate)])
        return run

    monkeypatch.setattr(training_run, "prepare", prepare)
    assert suite(tmp_path, encoder, overrides, lrs=[0.01, 0.05]).run([Cell("crops")]) == 0
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
    for lr in ("0.01", "0.05"):
        assert "eval/" not in (tmp_path / "out" / "crops" / f"lr_{lr}" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_mistakes_in_any_cell_are_found_before_one_runs_and_a_lost_file_fails_its_cell_alone(tmp_path, encoder):
    with pytest.raises(UserError, match=r"train_blocks=99\.0"):
        suite(tmp_path, encoder).check([Cell("crops"), Cell("crops", blocks="99")])
    with pytest.raises(UserError, match=r"optim\.lr=-1"):
        suite(tmp_path, encoder, lrs=[0.1, -1.0]).check([Cell("crops")])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        Suite(Recipe(str(tmp_path / "mine.py"), {}), str(encoder), str(tmp_path / "file"), [])
    done = tmp_path / "out" / "crops"
    done.mkdir(parents=True)
    some = suite(tmp_path, encoder)
    (done / "DONE").write_text("4\n")
    assert some.run([Cell("crops"), Cell("absent")]) == 2
    assert [row["data"] for row in results(tmp_path)] == ["crops", "absent"]
    assert "metrics.jsonl" in results(tmp_path)[0]["problem"]


def test_a_metric_that_was_not_measured_is_named_with_those_that_were(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 3, "eval/top1": 0.5, "val/top1": 0.2}\n{"step": 4, "eval/top1": 0.6}\n')
    assert measured(epath.Path(tmp_path), "", "eval") == ("top1", 0.6, 4)
    assert measured(epath.Path(tmp_path), "top1", "val") == ("top1", 0.2, 3)
    with pytest.raises(UserError, match=r"eval/map .*eval/top1"):
        measured(epath.Path(tmp_path), "map", "eval")


def test_learning_rates_that_are_no_numbers_are_refused():
    assert rates(["3e-4", "1"]) == [3e-4, 1.0]
    with pytest.raises(UserError, match="--lrs=1,fast"):
        rates(["1", "fast"])


def test_blocks_need_a_method_that_can_freeze(tmp_path, encoder):
    some = suite(tmp_path, encoder)
    some.recipe.module.get_config = lambda arg="": default("mae").lock()
    with pytest.raises(UserError, match=r"--blocks: method\.name='mae'"):
        some.config(Cell("mine", blocks="1"))
