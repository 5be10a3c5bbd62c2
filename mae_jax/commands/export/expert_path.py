"""Extracts a dense ViT for one task from a mixture of cluster-conditional experts.

MoCE, arXiv 2402.05382, section 3.3. The frozen encoder assigns the task's training images to clusters. These votes
choose a path: the tuple of one expert per block with experts, trained together. The other experts are dropped.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.config import default, resolved
from mae_jax.data import NO_DATA, DataInfo, OpenedData
from mae_jax.data.cluster_ids import Clusters
from mae_jax.errors import UserError
from mae_jax.evals import linear_probe
from mae_jax.evals.accumulators import HostRows
from mae_jax.evals.frozen_encoder import Frozen, frozen, with_data
from mae_jax.methods.base import Method, pool
from mae_jax.methods.mae import MAE
from mae_jax.methods.moce import MoCE
from mae_jax.models.upcycling import extract_path
from mae_jax.runtime import sharding
from mae_jax.storage import paths
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import workdir

MAX_PROBED_PATHS = 8  # the paths with the most votes
HELD_OUT_SHARE = 0.1  # share of the task's training images on which probes are compared
Path = tuple[int, ...]  # one expert per block with experts


class Task(NamedTuple):
    """Statistics of a task's training images."""

    votes: np.ndarray  # float64 [m], share of the images in each cluster
    feature: np.ndarray  # float32 [D], mean feature by the frozen encoder


class ExtractedExpert(NamedTuple):
    """Parameters and config of a masked autoencoder without experts, and lines to report to the user."""

    params: dict[str, Any]
    config: ConfigDict
    report: list[str]


def extract_expert(config: ConfigDict, params: Any, extras: Any, task: ConfigDict, how: str, seed: int = 0,
                   clusters: str = "") -> ExtractedExpert:
    """Extracts the path for a task from a mixture of experts.

    Args:
      config, params, extras: those of the mixture.
      task: a config whose group `data` describes the task's training images.
      how: 'vote', the path with the most votes, the nearest centroid breaking ties; 'probe', the best of the eight
        paths with the most votes, by a linear probe on a tenth of the task's training split; 'random', any path but the
        one with the most votes, as a control.
      seed: seed of 'random'.
      clusters: the folder of the clusters that the mixture was trained with; '': the one in its config.

    Raises:
      UserError: the run is no mixture with a gate by cluster, the clusters are gone, or the task has no images or
        labels.
    """
    if config.method.name != "moce" or config.method.gate != "cluster":
        raise UserError("--for-task needs a run of method.name=moce with method.gate=cluster")
    config = config.copy_and_resolve_references()
    config.method.clusters = clusters or config.method.clusters
    found = Clusters.read(config.method.clusters)
    method = MoCE(resolved(config), DataInfo(clusters=found))
    method.check_data()
    method.check_extras(extras)
    table, of_cluster = cluster_paths(method, params, extras)
    about = count_cluster_votes(found, paths.locate(config.method.clusters, "method.clusters"), task)
    votes = votes_per_path(of_cluster, about.votes)
    report = [f"path {name(path)}: {share:.1%} of the task's images" for path, share in ranked(votes) if share > 0]
    chosen = most_voted(votes, of_cluster, found, about)
    if how == "random":
        others = sorted(set(of_cluster) - {chosen})
        if not others:
            raise UserError(f"--for-task=random: all clusters use the path {name(chosen)}; there is no other")
        chosen = others[np.random.default_rng(seed).integers(len(others))]
        report.append(f"path {name(chosen)}: drawn at random")
    if how == "probe":
        candidates = [path for path, share in ranked(votes)[:MAX_PROBED_PATHS] if share > 0]
        scores = {path: probe(config, extracted(method, params, table, of_cluster, about, path)[0], task)
                  for path in candidates}
        chosen = max(candidates, key=scores.__getitem__)
        report += [f"path {name(path)}: {score:.4f} top-1 of a linear probe" for path, score in scores.items()]
    tree, error = extracted(method, params, table, of_cluster, about, chosen)
    if not method.straight:
        report.append(f"folded the mean gate into the experts; gates of the task's images on this path are off by "
                      f"{error:.1%} on average")
    return ExtractedExpert(tree, dense_config(config), [*report, f"taken: path {name(chosen)}"])


def cluster_paths(method: MoCE, params: Any, extras: Any) -> tuple[dict[int, np.ndarray], list[Path]]:
    """Returns the routing table, block → gate probabilities float32 [m, E], and the path of each cluster."""
    table = {block: np.asarray(each) for block, each in method.probabilities(params, extras).items()}
    return table, [tuple(int(each[cluster].argmax()) for each in table.values())
                   for cluster in range(method.num_clusters)]


def count_cluster_votes(found: Clusters, folder: epath.Path, task: ConfigDict) -> Task:
    """Assigns the task's training images to clusters by the frozen encoder in the folder of the clusters."""
    file = str(folder / "encoder.safetensors")
    own = workdir.config_of(file)
    if own is None:
        raise UserError(f"{file} has no config; cluster again")
    config = frozen(with_data(own, task), found.meta["block"])
    method, encoder = Frozen(config, found.meta["block"]), load_params(file)
    votes, feature = np.zeros(len(found.centroids)), np.zeros(len(found.mean))
    for values, _ in pooled(method, encoder):
        votes += np.bincount(found.nearest(values)[0], minlength=len(votes))
        feature += values.sum(0, dtype=np.float64)
    if not votes.sum():
        raise UserError(f"no image of data.source={task.data.source!r} {task.data.path} can be read")
    return Task(votes / votes.sum(), (feature / votes.sum()).astype(np.float32))


def pooled(method: Method, params: Any) -> Any:
    """Yields (features float [n, D], labels int [n]) of the training images of a method's config, batch by batch."""
    config = method.config
    mesh = sharding.make_mesh(method.config)
    inputs = OpenedData(config).batches(Method.eval_spec(method), Method.patch_order(method),
                                        rows=sharding.local_rows(mesh, config.batch_size))
    with jax.set_mesh(mesh):
        encode = jax.jit(lambda batch: pool(method.encode(params, {}, batch), config.model.pool))
        for batch in inputs.support():
            rows, batch = HostRows(mesh), sharding.to_devices(batch, mesh, config.batch_size)
            rows.add(batch["valid"] > 0, encode(batch), batch["label"])
            yield rows.collect()


def votes_per_path(of_cluster: list[Path], votes: np.ndarray) -> dict[Path, float]:
    """Returns path → share of the task's images, from the path of each cluster and the votes, float64 [m]."""
    out: dict[Path, float] = dict.fromkeys(of_cluster, 0.0)
    for path, share in zip(of_cluster, votes, strict=True):
        out[path] += float(share)
    return out


def ranked(votes: dict[Path, float]) -> list[tuple[Path, float]]:
    """Returns (path, votes), the most votes first."""
    return sorted(votes.items(), key=lambda item: (-item[1], item[0]))


def most_voted(votes: dict[Path, float], of_cluster: list[Path], found: Clusters, about: Task) -> Path:
    """Returns the path with the most votes; among equals, the one of the centroid nearest to the mean feature."""
    best = [path for path, share in votes.items() if np.isclose(share, max(votes.values()))]
    similar = found.centroids @ (about.feature - found.mean)
    return max(best, key=lambda path: max(s for s, other in zip(similar, of_cluster, strict=True) if other == path))


def extracted(method: MoCE, params: Any, table: dict[int, np.ndarray], of_cluster: list[Path], about: Task,
              path: Path) -> tuple[dict[str, Any], float]:
    """Returns the parameters without experts, and the mean relative error of the folded gates.

    If the mixture multiplies an expert's output by its gate, the mean gate of the task's images on that path is folded
    into the weights. The error is the mean deviation of these images' gates from it.
    """
    weights = about.votes * [other == path for other in of_cluster]
    weights = weights / weights.sum() if weights.sum() else np.array([float(other == path) for other in of_cluster])
    weights = weights / weights.sum()
    scale, errors = {}, [0.0]
    if not method.straight:
        for (block, each), expert in zip(table.items(), path, strict=True):
            scale[block] = float(weights @ each[:, expert])
            errors.append(float(weights @ np.abs(each[:, expert] / scale[block] - 1)))
    encoder = extract_path(params["encoder"], dict(zip(table, path, strict=True)), scale)
    return {"encoder": encoder, "decoder": params["decoder"]}, float(np.mean(errors[1:] or errors))


def probe(config: ConfigDict, tree: dict[str, Any], task: ConfigDict) -> float:
    """Returns the top-1 accuracy, in 0..1, of logistic regression on a held-out tenth of the task's training images."""
    own = frozen(with_data(dense_config(config), task), -1)
    parts = list(pooled(MAE(resolved(own), NO_DATA), tree))
    features, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    features, labels = features[labels >= 0], labels[labels >= 0]
    if len(np.unique(labels)) < 2:
        raise UserError("--for-task=probe needs a task with labels of several classes; --for-task=vote needs none")
    order = np.random.default_rng(0).permutation(len(labels))
    held, rest = np.split(order, [max(1, round(HELD_OUT_SHARE * len(order)))])
    return linear_probe.top1((features[rest], labels[rest]), (features[held], labels[held]), int(labels.max()) + 1)


def dense_config(config: ConfigDict) -> ConfigDict:
    """Returns the config of a masked autoencoder with the encoder and decoder of the mixture, without experts."""
    out = default("mae").unlock()
    out.update({name: value for name, value in config.items() if name != "method"})
    out.method.update({name: config.method[name] for name in out.method if name != "name"})
    return out.lock()


def name(path: Path) -> str:
    """Returns '1-3' for the path of the experts 1 and 3."""
    return "-".join(map(str, path))
