"""data.source=npz: arrays of images in one NumPy file, held in memory.

The arrays are x_train, y_train, x_test and y_test (Keras), or train_images, train_labels, val_images ... (MedMNIST), or
those named by data.image_key and data.label_key. Of the latter, a tenth, by a hash of the index, is 'test' if the
config uses it. Labels are optional: class numbers [n], or uint8 or bool [n, C], 1 where a class is in the image.
"""

import functools
from collections.abc import Collection

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.data.sources import splits
from mae_jax.data.sources.base import (
    UNLABELED,
    Example,
    Source,
    class_numbers,
    known_split,
    numbered_classes,
    numbered_name,
)
from mae_jax.errors import UserError, did_you_mean
from mae_jax.storage.npz import opened

SCHEMES = (("x_{}", "y_{}"), ("{}_images", "{}_labels"))


def load(data: ConfigDict, split: splits.Split) -> Source:
    """Opens a split; raises UserError if the file or its arrays are not as described."""
    path = epath.Path(data.path)
    if not data.path or not path.is_file():
        raise UserError(f"data.path={data.path!r} is not a file; data.source='npz' needs one")
    with opened(path) as arrays:
        names, image_key, label_key = set(arrays.files), data.image_key, data.label_key
        if scheme := _scheme(names):
            before, after = scheme[0].split("{}")
            known = [name.removeprefix(before).removesuffix(after) for name in names
                     if name.startswith(before) and name.endswith(after)]
            known_split(split, tuple(sorted(known)))
            image_key, label_key = (each.format(split.name) for each in scheme)
        if image_key not in names:
            raise UserError(f"{data.path} has no array data.image_key={image_key!r}; {did_you_mean(image_key, names)}")
        images, labels = arrays[image_key], arrays.get(label_key)
    if scheme:
        return _source(images, labels, image_key).sliced(split)
    chosen = splits.within(map(str, range(len(images))), *splits.part(split.name, splits.holds_out(data)))
    return _source(images, labels, image_key).only(chosen).sliced(split)


def split_name(data: ConfigDict, name: str) -> str:
    """Returns the name of a split in the file."""
    with opened(epath.Path(data.path)) as arrays:
        return name if _scheme(arrays.files) else splits.held_out_name(name)


def _scheme(names: Collection[str]) -> tuple[str, str] | None:
    """Returns the name patterns of the arrays of images and labels per split; None without splits."""
    return next((scheme for scheme in SCHEMES if scheme[0].format("train") in names), None)


def _source(images: np.ndarray, labels: np.ndarray | None, name: str) -> Source:
    """Builds a source from images and labels; raises UserError for other shapes or dtypes.

    Args:
      images: uint8 [n, height, width], [.., 1] or [.., 3].
      labels: integers [n] or [n, 1], or 0 and 1 [n, C].
      name: of the array of images.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise UserError(f"array {name!r} is {images.dtype} {list(images.shape)}; expected uint8 [n, height, width, 3] "
                        "or [n, height, width]")
    if images.ndim == 3:
        images = images[..., None]
    several = _several(labels, len(images), name) if labels is not None else None
    labels = np.full(len(images), UNLABELED) if labels is None or several is not None else np.reshape(labels, -1)
    if len(labels) != len(images) or labels.dtype.kind not in "iubf":
        raise UserError(f"the labels of {name!r} are {labels.dtype} {list(labels.shape)}; "
                        f"expected integers [{len(images)}]")
    labels = class_numbers(labels, f"the labels of {name!r}")
    classes = numbered_classes(labels) if several is None else tuple(map(str, range(several.shape[1])))

    read = functools.partial(_read, images, labels, several)
    return Source(len(images), read, functools.partial(numbered_name, name), classes,
                  () if several is None else ("labels",), lambda i: int(labels[i]))


def _read(images: np.ndarray, labels: np.ndarray, several: np.ndarray | None, i: int) -> Example:
    return Example(np.ascontiguousarray(np.broadcast_to(images[i], (*images.shape[1:3], 3))), int(labels[i]),
                   None if several is None else several[i])


def _several(labels: np.ndarray, images: int, name: str) -> np.ndarray | None:
    """Returns multi-hot labels, uint8 [n, C]; None for class numbers."""
    if labels.ndim != 2 or labels.shape[1] == 1 or len(labels) != images or labels.dtype not in (np.uint8, bool):
        return None
    if labels.max(initial=0) > 1:
        raise UserError(f"the labels of {name!r} are {labels.dtype} {list(labels.shape)} up to {labels.max()}; "
                        "expected 0 and 1 for several labels of each image")
    return labels.astype(np.uint8)
