"""A run of a detector on data in COCO's format: it is evaluated, and goes on bit for bit from a checkpoint."""

import json
import shutil

import numpy as np
import pytest

from mae_jax.param_tree import flatten
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import loop
from tests.helpers.coco_data import coco
from tests.helpers.tiny import tiny_config

pytestmark = pytest.mark.slow


def test_a_resumed_detector_is_that_of_an_uninterrupted_run_bit_for_bit(tmp_path):
    coco(tmp_path / "data")
    config = tiny_config({
        "data.source": "coco", "data.path": str(tmp_path / "data"), "data.eval_split": "val", "data.augment": "lsj",
        "data.image_size": (32, 32), "eval.crop_ratio": (1.0,), "batch_size": 4, "train.duration": "4 steps",
        "checkpoint.every": "2 steps", "eval.every": "4 steps", "optim.milestones": (0.75,), "optim.layer_decay": 0.7,
        "model.drop_path": 0.1, "model.positions": "learned", "optim.lr": 0.01, "data.workers": "0"}, "detection")
    assert loop.train(config, str(tmp_path / "run")) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
    (tmp_path / "resumed" / "DONE").unlink()
    assert loop.train(config, str(tmp_path / "resumed")) == 0
    first, second = (flatten(load_params(tmp_path / name / "checkpoints" / "4")) for name in ("run", "resumed"))
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        np.testing.assert_array_equal(second[name], leaf, err_msg=name)
    before = flatten(load_params(tmp_path / "run" / "checkpoints" / "2"))
    assert any((np.asarray(before[name]) != leaf).any() for name, leaf in first.items())
    rows = [json.loads(line) for line in (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()]
    figures = {name for row in rows for name in row}
    assert {"train/loss_masks", "eval/loss", "eval/box_ap", "eval/mask_ap"} <= figures
