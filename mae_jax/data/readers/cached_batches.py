"""data.source=batches: examples made beforehand (inspect --write=batches), for machines without TensorFlow. NumPy only.

A folder, local or gs://, with train.npz, support.npz, evaluate.npz and optionally validate.npz, whose arrays are batch
fields [n, ...], and meta.json with the class names, the number of training images, and how patches are masked.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.data.cluster_ids import Clusters
from mae_jax.data.identity import sampled, short_hash
from mae_jax.data.info import DataInfo
from mae_jax.data.masking import PatchOrder, View, rolled, with_views
from mae_jax.errors import UserError
from mae_jax.recipe_version import stored_name
from mae_jax.runtime import bounded_json
from mae_jax.storage.file_kinds import unreadable
from mae_jax.storage.npz import opened
from mae_jax.storage.paths import locate, read_bytes

if TYPE_CHECKING:
    import jax

# Values in the padding of the last batch; other fields repeat the first example.
PADDING = {"valid": 0, "label": -1, "labels": 0, "pixel_label": 255, "id": -1, "replaced": 0,
           "box_valid": 0}
Arrays = dict[str, np.ndarray]
Spec = dict[str, "jax.ShapeDtypeStruct"]


def hiding(order: PatchOrder, views: tuple[View, ...]) -> dict[str, Any]:
    """Returns the entries of meta.json on orders and views, as JSON parses them."""
    return bounded_json.as_read({"order": order, "views": views})


def joined_from(config: ConfigDict, clusters: Clusters | None) -> dict[str, str]:
    """Returns the entries of meta.json on the classes kept and the clusters joined."""
    return {"kept": config.data.get("classes", ""), "clusters": clusters.fingerprint() if clusters else ""}


def open_folder(config: ConfigDict, meta: dict[str, Any], info: DataInfo, spec: Spec, views: tuple[View, ...],
                order: PatchOrder, rows: np.ndarray) -> dict[str, Any]:
    """Returns the fields of `data.Inputs`; raises UserError if the folder does not match the config.

    Batches that were made with views can evaluate an encoder without views, but not train one. `meta` is the result of
    `read_meta`.
    """
    folder = locate(config.data.path, "data.path")
    wanted = hiding(order, views)
    for name, value in joined_from(config, info.clusters).items() if "kept" in meta else ():
        if meta[name] != value:
            field = {"kept": "data.classes", "clusters": "method.clusters"}[name]
            raise UserError(f"the batches of {folder} were made with another {field}; make them again with this config")
    if meta.get("order") != wanted["order"]:
        older = order.kind == "published_block" and meta.get("order") == ["block", *wanted["order"][1:]]  # of 0.1.0
        raise UserError(f"the batches of {folder} were made for the patch order {meta.get('order')} (kind, grid, "
                        f"masked, group), but the config asks for {wanted['order']}; make them again with this "
                        f"config{', or train on them with recipe_version=1' * older}")
    trains = meta.get("views") == wanted["views"]
    if not trains and views:
        raise UserError(f"the batches of {folder} were made for other views of the images than the config asks for; "
                        "make them again with this config")
    names = ("support", "evaluate", *(("validate",) if (folder / "validate.npz").is_file() else ()))
    parts = {name: _load(folder / f"{name}.npz", spec) for name in names}
    if trains:
        parts["train"] = _load(folder / "train.npz", with_views(spec, views))
    sizes = {name: len(next(iter(arrays.values()))) for name, arrays in parts.items()}
    if sizes.get("train", 0) % order.group:
        raise UserError(f"{folder} has {sizes['train']} training examples, which is not a multiple of the "
                        f"{order.group} images that share an order; make them again, with a batch_size that is")

    def train(step: int) -> Iterator[Arrays]:
        if not trains:
            raise UserError(f"the batches of {folder} were made for a method with its own views; make them again")
        return _endless(parts["train"], sizes["train"], config.batch_size, rows, step)

    def finite(name: str) -> Callable[..., Iterator[Arrays]]:
        def batches(ratio: float = config.eval.crop_ratio[0]) -> Iterator[Arrays]:
            if ratio != config.eval.crop_ratio[0]:
                raise UserError(f"{folder} has one crop of each image, and not eval.crop_ratio={ratio}; use the images")
            if name not in parts:
                return iter(())
            return _finite(parts[name], sizes[name], config.batch_size, rows, order.group)
        return batches

    def extra(name: str) -> Iterator[Arrays]:
        raise UserError(f"cached batches have no further test set eval.sets={name!r}; use data.source='tfds'")

    return {
        "train": train, "support": finite("support"), "evaluate": finite("evaluate"), "validate": finite("validate"),
        "extra": extra,
        "num_train": meta["num_train"], "num_val": sizes.get("validate", 0),
        "classes": info.classes if "labels" in spec else info.single_label_classes,
        "description": f"batches {folder}: {sizes.get('train', 0)} cached training examples of {meta['num_train']} "
                       f"images, {sizes['evaluate']} for evaluation; {len(meta['classes']) or 'no'} classes",
        "bad": deque(maxlen=0),
        "identity": lambda: {name: _identity(parts[name], size) for name, size in sizes.items()},
    }


def _identity(arrays: Arrays, size: int) -> dict[str, str]:
    fields = [arrays[name][sampled(size)].tobytes() for name in sorted(arrays) if name.endswith(("patches", "label"))]
    return {"content": short_hash([str(size).encode(), *fields])}


def read_meta(path: str) -> dict[str, Any]:
    """Reads meta.json of the cached batches; raises UserError."""
    file = locate(path, "data.path") / "meta.json"
    content = read_bytes(file) if path else None
    if content is None:
        raise UserError(f"data.path={path!r} has no meta.json of cached batches; make them: "
                        "mae_jax inspect --config=... --to=DIR --write=batches")
    try:
        meta = bounded_json.parse_object(content)
        if not isinstance(meta.get("num_train"), int) or not isinstance(meta.get("classes"), list):
            raise ValueError("it has no number num_train, or no list classes")
        if not all(isinstance(name, str) for name in meta["classes"]) or meta["num_train"] < 0:
            raise ValueError("num_train is negative, or a class is not a string")
    except ValueError as error:
        raise UserError(unreadable(file, content, error)) from None
    return meta


def multi_label(path: str, meta: dict[str, Any]) -> bool:
    """Returns whether images can have any number of labels; for folders of 0.1.0, this is read from the arrays."""
    file = locate(path, "data.path") / "evaluate.npz"
    if "multi_label" in meta or not file.is_file():
        return meta.get("multi_label", False)
    with opened(file) as stored:
        return "labels" in stored.files


def _load(path: epath.Path, spec: Spec) -> Arrays:
    """Reads the fields of the spec from one file; raises UserError if shapes or dtypes differ."""
    if not path.is_file():
        raise UserError(f"the cached batches have no {path}; make them again")
    with opened(path) as stored:
        names = {name: stored_name(name, stored.files) for name in spec}
        absent = [name for name, found in names.items() if found not in stored.files]
        arrays = {name: stored[found] for name, found in names.items() if name not in absent}
    if absent:
        raise UserError(f"{path} has no field {absent[0]!r}; it has {', '.join(sorted(arrays))}")
    for name, struct in spec.items():
        shape, dtype = arrays[name].shape[1:], arrays[name].dtype
        if shape != struct.shape[1:] or dtype != struct.dtype:
            raise UserError(f"{path}: {name!r} is {dtype} {list(shape)} per example, but the config needs "
                            f"{struct.dtype} {list(struct.shape[1:])}; the batches were made with another image_size "
                            "or patch")
    return arrays


def _endless(arrays: Arrays, size: int, batch: int, rows: np.ndarray, step: int) -> Iterator[Arrays]:
    """Yields these rows of the batches from `step` on, cycling through the file."""
    for number in itertools.count(step):
        chosen = (number * batch + rows) % size
        yield {name: array[chosen] for name, array in arrays.items()}


def _finite(arrays: Arrays, size: int, batch: int, rows: np.ndarray, group: int) -> Iterator[Arrays]:
    """Yields these rows of all batches, the last one padded; padding rows have the order of their place in a group."""
    for first in range(0, size, batch):
        positions = first + rows
        beyond = positions >= size
        out = {name: array[np.where(beyond, 0, positions)] for name, array in arrays.items()}
        for name in PADDING.keys() & out.keys():
            out[name][beyond] = PADDING[name]
        if group > 1:
            begun = arrays["order"][(size - 1) // group * group]
            for row in np.flatnonzero(beyond):
                out["order"][row] = rolled(begun, positions[row] % group, group)
        yield out
