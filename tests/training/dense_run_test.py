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


def resumed(config, folder):
    """Runs a config of 4 steps, and again from step 2; checks that both end alike. Returns the names of all figures."""
    assert loop.train(config, str(folder / "run")) == 0
    shutil.copytree(folder / "run", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "4")
    (folder / "resumed" / "DONE").unlink()
    assert loop.train(config, str(folder / "resumed")) == 0
    first, second, before = (flatten(load_params(str(folder / name), extras=True)) for name in (
        "run/checkpoints/4", "resumed/checkpoints/4", "run/checkpoints/2"))
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        np.testing.assert_array_equal(second[name], leaf, err_msg=name)
    changed = {name.rpartition("/")[2] for name, leaf in first.items() if (np.asarray(before[name]) != leaf).any()}
    assert "kernel" in changed
    assert ("mean" in changed) == any(name.endswith("/mean") for name in first)  # moments of batch norms
    rows = [json.loads(line) for line in (folder / "resumed" / "metrics.jsonl").read_text().splitlines()]
    return {name for row in rows for name in row}, changed


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_resumed_detector_is_that_of_an_uninterrupted_run_bit_for_bit(tmp_path, norm):
    coco(tmp_path / "data")
    config = tiny_config({
        **STEPS, "data.source": "coco", "data.path": str(tmp_path / "data"), "data.eval_split": "val",
        "data.augment": "lsj", "data.image_size": (32, 32), "method.norm": norm, "optim.milestones": (0.75,)},
        "detection")
    figures, changed = resumed(config, tmp_path)
    assert {"train/loss_masks", "eval/loss", "eval/box_ap", "eval/mask_ap"} <= figures
    assert ("mean" in changed) == (norm == "batch")


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_resumed_upernet_is_that_of_an_uninterrupted_run_bit_for_bit(tmp_path, norm):
    config = tiny_segment({
        **STEPS, "data.source": "photo_mosaic", "data.eval_split": "test", "data.scales": (0.5, 1.5),
        "method.head": "upernet", "method.train_blocks": -1, "method.head_width": 8, "method.aux_width": 4,
        "method.norm": norm, "method.dropout": 0.1, "method.classes": 17, "method.test": "whole"})
    figures, changed = resumed(config, tmp_path)
    assert {"train/loss", "eval/loss", "eval/miou", "eval/own_size/miou"} <= figures
    assert ("mean" in changed) == (norm == "batch")
