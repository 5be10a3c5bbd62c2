"""Runs of detectors and of UperNet are evaluated, and go on bit for bit from a checkpoint."""

import json
import shutil

import numpy as np
import pytest

from mae_jax.param_tree import flatten
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import loop
from tests.helpers.coco_data import coco
from tests.helpers.tiny import tiny_config, tiny_segment

pytestmark = pytest.mark.slow

STEPS = {"batch_size": 4, "train.duration": "4 steps", "checkpoint.every": "2 steps", "eval.every": "4 steps",
         "eval.crop_ratio": (1.0,), "model.drop_path": 0.1, "model.positions": "learned", "optim.layer_decay": 0.7,
         "optim.lr": 0.01, "data.workers": "0"}
MEASURED = "time", "images_per_sec", "data_wait"  # on the clock


def resumed(config, folder, caplog):
    """Runs a config of 4 steps, and again from step 2; checks that both end alike, with the same figures.

    Returns:
      The last figures, and the last parts of the names of parameters and moments that the last two steps changed.
    """
    caplog.set_level("INFO")
    assert loop.train(config, str(folder / "run")) == 0
    shutil.copytree(folder / "run", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "4")
    (folder / "resumed" / "DONE").unlink()
    assert loop.train(config, str(folder / "resumed")) == 0
    assert "resumed at step 2" in caplog.text
    first, second, before = (flatten(load_params(str(folder / name), extras=True)) for name in (
        "run/checkpoints/4", "resumed/checkpoints/4", "run/checkpoints/2"))
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        np.testing.assert_array_equal(second[name], leaf, err_msg=name)
    changed = {name.rpartition("/")[2] for name, leaf in first.items() if (np.asarray(before[name]) != leaf).any()}
    assert "kernel" in changed
    figures, again = (last_figures(folder / name / "metrics.jsonl") for name in ("run", "resumed"))
    assert {name: value for name, value in figures.items() if not name.endswith(MEASURED)} == {
        name: value for name, value in again.items() if not name.endswith(MEASURED)}
    return figures, changed


def last_figures(file):
    """Returns the figures of step 4."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {name: value for row in rows if row["step"] == 4 for name, value in row.items()}


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_resumed_detector_is_that_of_an_uninterrupted_run_bit_for_bit(tmp_path, norm, caplog):
    coco(tmp_path / "data")
    config = tiny_config({
        **STEPS, "data.source": "coco", "data.path": str(tmp_path / "data"), "data.eval_split": "val",
        "data.augment": "lsj", "data.image_size": (32, 32), "method.norm": norm, "optim.milestones": (0.75,)},
        "detection")
    figures, changed = resumed(config, tmp_path, caplog)
    assert {"train/loss_masks", "eval/loss", "eval/box_ap", "eval/mask_ap"} <= figures.keys()
    assert ({"mean", "var"} <= changed) == (norm == "batch")


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_resumed_upernet_is_that_of_an_uninterrupted_run_bit_for_bit(tmp_path, norm, caplog):
    config = tiny_segment({
        **STEPS, "data.source": "photo_mosaic", "data.eval_split": "test", "data.scales": (0.5, 1.5),
        "method.head": "upernet", "method.train_blocks": -1, "method.head_width": 8, "method.aux_width": 4,
        "method.norm": norm, "method.dropout": 0.1, "method.classes": 17, "method.test": "whole"})
    figures, changed = resumed(config, tmp_path, caplog)
    assert {"train/loss", "eval/loss", "eval/miou", "eval/own_size/miou"} <= figures.keys()
    assert ({"mean", "var"} <= changed) == (norm == "batch")
