"""Clusters the images of a run by the features of its encoder, for MoCE (arXiv 2402.05382, section 3.1)."""

from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from mae_jax import errors
from mae_jax.commands.cluster.feature_store import Features
from mae_jax.data import Inputs, OpenedData
from mae_jax.data.cluster_ids import Clusters, fingerprint
from mae_jax.errors import UserError
from mae_jax.evals.frozen_encoder import Frozen, frozen, with_data
from mae_jax.evals.image_grid import tile
from mae_jax.inference.parts import data_of
from mae_jax.methods.base import Method
from mae_jax.ops import spherical_kmeans
from mae_jax.ops.example_ids import whole as whole_ids
from mae_jax.ops.patches import PatchGrid
from mae_jax.param_tree import split_eval_params
from mae_jax.runtime import bounded_json, peers, progress, sharding
from mae_jax.storage import paths, safetensors_file
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import workdir

MAX_SHOWN_CLUSTERS, IMAGES_PER_CLUSTER = 32, 8  # in clusters.png
# Images that are searched for the members in clusters.png if the data have no random access.
MAX_SEARCHED_IMAGES = 16_384


def cluster(source: str, to: str, clusters: int, block: int, ratio: float, seed: int, data: ConfigDict | None) -> int:
    """Writes the clusters of a run's images to a folder. Returns the exit code; raises UserError.

    Args:
      source: a workdir, or one step's folder in it.
      to: the folder, local or gs://; a second call reuses the features in it.
      clusters: the number of clusters.
      block: the block whose tokens are pooled to features; -1: the encoder's output.
      ratio: the largest permitted ratio of the sizes of the largest and the smallest cluster.
      seed: seed of the initial centroids.
      data: a config whose group `data` replaces the run's own.
    """
    folder = paths.locate_checkpoints(source, "--from")
    config = workdir.read_config(workdir.of_checkpoint(folder))
    config = frozen(config if data is None else with_data(config, data), block)
    if config.method.name == "moce":
        raise UserError(f"{source} is a mixture of experts; use the encoder that it started from")
    method, to_folder = Frozen(config, block), paths.locate(to, "--to")
    mesh = sharding.make_mesh(method.config)
    inputs = pictures(method, sharding.local_rows(mesh, config.batch_size))
    if jax.process_index() == 0:
        print(inputs.description, flush=True)
    if inputs.num_train < 2 * clusters:
        raise UserError(f"--clusters={clusters} of {inputs.num_train} images; use at most {inputs.num_train // 2}")
    params, extras = split_eval_params(load_params(folder, ema=True, extras=True))
    parts = {config.data.train_split: inputs.support, config.data.val_split: inputs.validate,
             config.data.eval_split: inputs.evaluate}
    about = {"encoder": fingerprint(params), "block": block, "data": data_of(config), "pictures": inputs.num_train,
             "batch_size": config.batch_size,
             "examples": {split: part.digest() for split, part in inputs.parts.items()}}
    meta = {"from": source, "seed": seed, "ratio": ratio, "clusters": clusters, **about}
    unlike = other_arguments(to_folder, meta)
    if unlike:
        raise UserError(f"{to} holds clusters made with other {unlike}; runs may read them: name another folder")
    if peers.first_true(peers.broadcast(about) != bounded_json.as_read(about)):
        raise UserError(f"the processes do not see the same encoder or images; cluster with one step's folder, as "
                        f"{source}/checkpoints/STEP, on storage that all of them share")
    if peers.broadcast((to_folder / "clusters.npz").is_file()):
        if jax.process_index() == 0:
            print(f"{to_folder}: there already; {summary(Clusters.read(to))}")
        return errors.FINISHED
    found, uneven = {}, ""
    with jax.set_mesh(mesh):
        for number, (split, batches) in enumerate((split, made) for split, made in parts.items() if split):
            found[split] = Features(to_folder / "features" / str(number), {**about, "split": split})
            with progress.doing(f"features of {split}") as line:
                found[split].compute(method, params, extras, batches(), mesh, line.advance)
    if jax.process_index() == 0:
        with progress.doing(f"making {clusters} clusters"):
            made = made_of(found, config.data.train_split, clusters, ratio, seed)
        made.meta.update(meta)
        uneven = "" if spherical_kmeans.size_ratio(made.sizes) <= ratio else summary(made)
    if uneven := peers.broadcast(uneven):
        raise UserError(f"--ratio={ratio:g} to 1 was not reached: {uneven}. Perhaps many images are alike; use fewer "
                        "--clusters, or a larger --ratio; the features stay")
    if jax.process_index() == 0:
        write(made, to_folder, params, config, found[config.data.train_split])
        print(f"{to_folder}: {summary(made)}")
    peers.broadcast(None)  # the others wait
    return errors.FINISHED


def write(made: Clusters, folder: epath.Path, params: Any, config: ConfigDict, features: Features) -> None:
    """Writes the encoder, clusters.png and the clusters; the clusters last, as the mark of a complete folder."""
    safetensors_file.save(folder / "encoder.safetensors", {"encoder": params["encoder"]}, workdir.metadata(config))
    with (folder / "clusters.png").open("wb") as file:
        Image.fromarray(picture(made, config, features)).save(file, "PNG")
    made.write(folder)


def pictures(method: Method, rows: np.ndarray | None = None) -> Inputs:
    """Opens the images of a method's config with the batch fields of every method, no patch masked; rows: see
    `OpenedData.batches`."""
    return OpenedData(method.config).batches(Method.eval_spec(method), Method.patch_order(method), rows=rows)


def other_arguments(folder: epath.Path, meta: dict[str, Any]) -> str:
    """Returns the first argument of `meta` whose value differs from that of the clusters in a folder; '' for none."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to={folder} is a file; clusters of images are a folder")
    if not (folder / "clusters.npz").is_file():
        return ""
    there = Clusters.read(str(folder)).meta
    return next((key for key in meta if key != "from" and there.get(key) != bounded_json.as_read(meta[key])), "")


def made_of(features: dict[str, Features], train: str, clusters: int, ratio: float, seed: int) -> Clusters:
    """Runs balanced k-means on the features of the training split and assigns the examples of all splits."""
    rng, mean = np.random.default_rng(seed), features[train].mean()
    sample = features[train].sample(spherical_kmeans.PER_CLUSTER * clusters, mean, rng)

    def points() -> Any:
        return features[train].points(mean)

    centroids, prices, plain = spherical_kmeans.balanced_kmeans(points, sample, clusters, ratio, rng)
    assigned = {}
    for split, part in features.items():
        chosen, similar = spherical_kmeans.assign(lambda part=part: part.points(mean, readable=False), centroids,
                                                  prices)
        ids = np.concatenate([ids for _, ids in part.chunks(readable=False)])
        assigned[split] = np.full(ids.max() + 1, -1, np.int32)
        assigned[split][ids] = chosen
        if split == train:
            readable = np.isin(ids, np.concatenate([some for _, some in part.chunks()]))
            sizes, similarity = np.bincount(chosen[readable], minlength=clusters), float(similar[readable].mean())
    meta = {"clusters": clusters, "largest": int(sizes.max()), "smallest": int(sizes.min()),
            "similarity": similarity, "similarity_of_kmeans": float(plain)}
    return Clusters(centroids, prices, mean, sizes, assigned, meta)


def summary(made: Clusters) -> str:
    """Returns one line about cluster sizes and similarity."""
    meta = made.meta
    uneven = f" ({meta['largest'] / meta['smallest']:.2f} to 1)" if meta["smallest"] else ""
    return (f"{meta['clusters']} clusters of {meta['smallest']} to {meta['largest']} images{uneven}; "
            f"similarity to the own centroid {meta['similarity']:.3f}, of k-means {meta['similarity_of_kmeans']:.3f}")


def nearest(made: Clusters, features: Features, split: str, shown: np.ndarray, most: float) -> list[np.ndarray]:
    """Returns, for each cluster in `shown`, the ids of the IMAGES_PER_CLUSTER images nearest to its centroid, int [n].

    Only about the first `most` images are searched.
    """
    best = [(np.zeros(0, np.int64), np.zeros(0, np.float32)) for _ in shown]
    seen = 0
    for values, ids in features.chunks():
        similar = spherical_kmeans.unit(values - made.mean) @ made.centroids[shown].T
        for row, number in enumerate(shown):
            own = made.assigned[split][ids] == number
            found, close = (np.concatenate(both) for both in zip(best[row], (ids[own], similar[own, row]), strict=True))
            first = np.argsort(-close, kind="stable")[:IMAGES_PER_CLUSTER]
            best[row] = found[first], close[first]
        seen += len(ids)
        if seen >= most:
            break
    return [found for found, _ in best]


def picture(made: Clusters, config: ConfigDict, features: Features) -> np.ndarray:
    """Returns a grid of the images nearest to the centroids, at most MAX_SHOWN_CLUSTERS rows, uint8 [H, W, 3]."""
    from mae_jax.data.sources.base import Source  # imports TensorFlow

    shown = np.unique(np.linspace(0, len(made.centroids) - 1, min(MAX_SHOWN_CLUSTERS, len(made.centroids))).astype(int))
    inputs = pictures(Frozen(config, -1))  # with the rows of all processes
    anywhere = isinstance(inputs.parts.get(config.data.train_split), Source)
    members = nearest(made, features, config.data.train_split, shown, np.inf if anywhere else MAX_SEARCHED_IMAGES)
    place = {int(number): (row, column) for row, ids in enumerate(members) for column, number in enumerate(ids)}
    grid = PatchGrid.of(config)
    blank = np.full((*grid.image_size, 3), 255, np.uint8)
    rows = [[blank] * IMAGES_PER_CLUSTER for _ in shown]
    for batch in inputs.support(np.array(sorted(place))) if anywhere else inputs.support():
        ids = whole_ids(batch["id"])
        for k in np.flatnonzero(np.isin(ids, list(place))):
            row, column = place.pop(int(ids[k]))
            one = slice(k, k + 1)
            rows[row][column] = grid.unpatchify(batch["patches"][one], batch["order"][one])[0]
        if not place:
            break
    names = [f"cluster {number}\n{made.sizes[number]} images" for number in shown]
    return tile(rows, ["nearest", *[""] * (IMAGES_PER_CLUSTER - 1)],
                f"{len(shown)} of {len(made.centroids)} clusters", names)
