"""Which path of experts a task gets, and what becomes of gates that weigh; on random mixtures, without training."""

import jax
import numpy as np
import pytest

from mae_jax.commands.export import expert_path
from mae_jax.commands.export.expert_path import Task
from mae_jax.data.cluster_ids import Clusters
from mae_jax.errors import UserError
from mae_jax.param_tree import flatten
from tests.helpers.tiny import tiny_config, tiny_method, tiny_params

COUNT, WIDTH = 6, 12  # clusters, and values of a centroid
PATHS = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 2)]  # of the clusters, through two blocks with four experts


class Mixture:
    """A mixture whose clusters take these paths, its clusters in a folder, and a task with these votes."""

    def __init__(self, folder, votes, monkeypatch, fields=None, paths=PATHS):
        draws = np.random.default_rng(0)
        centroids = np.linalg.qr(draws.normal(size=(WIDTH, WIDTH)))[0][:COUNT].astype(np.float32)
        about = {"block": -1, "data": {"source": "photo_crops", "name": "", "classes": ""}}
        self.clusters = Clusters(centroids, np.zeros(COUNT, np.float32), np.zeros(WIDTH, np.float32),
                                 np.full(COUNT, 10), meta=about)
        self.clusters.write(folder)
        self.folder = str(folder)
        self.config = tiny_config({"method.blocks": "all", "method.num_clusters": COUNT, "model.pool": "mean",
                                   "method.centroid_width": WIDTH, "method.clusters": str(folder)} | (fields or {}),
                                  "moce")
        self.method, self.params = tiny_method(self.config), tiny_params(self.config)
        self.extras = {"centroids": self.clusters.standard(), "share": np.full(COUNT, 1 / COUNT, np.float32)}
        for gate, chosen in zip(self.params["gates"].values(), zip(*paths, strict=True), strict=True):
            logits = draws.uniform(size=(COUNT, 4)) + 2 * np.eye(4)[list(chosen)]
            gate["kernel"] = (np.linalg.pinv(self.extras["centroids"]) @ logits).astype(np.float32)
        self.task = Task(np.asarray(votes, np.float64), centroids[2] * 0.7 + centroids[1] * 0.3)
        self.looked = []
        monkeypatch.setattr(expert_path, "count_cluster_votes", lambda clusters, folder,
                            task: self.looked.append(folder) or self.task)

    def cut(self, how, seed=0, config=None, clusters=""):
        return expert_path.extract_expert(config or self.config, self.params, self.extras, tiny_config(), how, seed,
                                          clusters)


def experts_of(tree):
    """Returns the first value of each block's perceptron."""
    return [tree["encoder"][f"block_{i:02d}"]["mlp"]["fc1"]["kernel"] for i in range(2)]


def test_the_path_of_most_votes_is_taken_and_of_equal_ones_that_of_the_nearest_centroid(tmp_path, monkeypatch):
    mixture = Mixture(tmp_path, [0.1, 0.2, 0.2, 0.2, 0.2, 0.1], monkeypatch)
    found = mixture.cut("vote")
    assert found.report[-1] == "taken: path 1-0"
    for kernel, block, expert in zip(experts_of(found.params), ("block_00", "block_01"), PATHS[2], strict=True):
        np.testing.assert_array_equal(kernel, mixture.params["encoder"][block]["experts"]["fc1"]["kernel"][expert])
    mixture.task = mixture.task._replace(votes=np.array([0.1, 0.1, 0.1, 0.1, 0.2, 0.4]))
    assert mixture.cut("vote").report[-1] == "taken: path 3-2"


def test_the_best_probe_and_another_path_at_random_are_taken(tmp_path, monkeypatch):
    mixture = Mixture(tmp_path, [0.4, 0.3, 0.2, 0.1, 0.0, 0.0], monkeypatch)
    scores = iter([0.5, 0.9, 0.7, 0.6])
    monkeypatch.setattr(expert_path, "probe", lambda *_: next(scores))
    found = mixture.cut("probe")
    assert found.report[-1] == "taken: path 0-1"
    assert sum("linear probe" in line for line in found.report) == 4  # of the paths with votes
    drawn = {mixture.cut("random", seed).report[-1] for seed in range(40)}
    assert drawn == {f"taken: path {expert_path.name(path)}" for path in PATHS[1:]}
    for gate in mixture.params["gates"].values():
        gate["kernel"] = gate["kernel"] * 0  # all take the first experts
    with pytest.raises(UserError, match="path 0-0"):
        mixture.cut("random")


def test_weighing_gates_are_folded_as_the_mean_of_the_tasks_pictures_on_the_path(tmp_path, monkeypatch):
    mixture = Mixture(tmp_path, [0.4, 0.1, 0.1, 0.1, 0.2, 0.1], monkeypatch, {"method.gate_weight": "value"},
                      [(2, 1), (2, 1), (0, 0), (1, 1), (2, 1), (3, 3)])
    table = jax.device_get(mixture.method.probabilities(mixture.params, mixture.extras))
    found, taken = mixture.cut("vote"), (2, 1)
    assert found.report[-1] == "taken: path 2-1"
    weights = np.array([0.4, 0.1, 0, 0, 0.2, 0]) / 0.7
    errors = []
    for block, each in table.items():
        mean = weights @ each[:, taken[block]]
        errors.append(weights @ np.abs(each[:, taken[block]] / mean - 1))
        perceptron = found.params["encoder"][f"block_{block:02d}"]["mlp"]["fc2"]
        experts = mixture.params["encoder"][f"block_{block:02d}"]["experts"]["fc2"]
        for name in ("kernel", "bias"):
            np.testing.assert_allclose(perceptron[name], mean * experts[name][taken[block]], rtol=1e-5)
    assert found.report[-2].endswith(f"off by {np.mean(errors):.1%} on average")
    assert np.mean(errors) > 0.001
    assert flatten(found.params).keys() == flatten(tiny_params(tiny_config())).keys()


def test_clusters_that_were_moved_can_be_named(tmp_path, monkeypatch):
    mixture = Mixture(tmp_path, [1.0, 0, 0, 0, 0, 0], monkeypatch)
    config = mixture.config.copy_and_resolve_references()
    config.method.clusters = "gone"
    with pytest.raises(UserError, match=r"method.clusters='gone' .*clusters.npz"):
        mixture.cut("vote", config=config)
    moved = mixture.cut("vote", config=config, clusters=mixture.folder)
    assert moved.report == mixture.cut("vote").report
    assert list(map(str, mixture.looked)) == [mixture.folder, mixture.folder]
