"""The input images of inference, one part per split: from any data source, or files by name."""

import glob
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.config import default, from_dict, read_as_begun
from mae_jax.data.decode import read_file
from mae_jax.data.masking import PatchOrder
from mae_jax.data.readers import random_access
from mae_jax.data.sources import folder_listing, registry
from mae_jax.data.sources.base import UNLABELED, Example, RecordStream, Source
from mae_jax.data.transforms.example import ExampleBuilder, Spec
from mae_jax.errors import UserError, printable
from mae_jax.evals.frozen_encoder import with_data
from mae_jax.ops.patches import PatchGrid
from mae_jax.param_tree import flat
from mae_jax.storage.paths import locate, normalized

DATA = ("source", "name", "path", "train_split", "val_split", "eval_split", "classes", "image_size", "resize",
        "image_key")  # fields of the group `data` that determine the images and their preprocessing
IMAGES = "images"  # name of the split of files that are given by name


@dataclass(frozen=True)
class Part:
    """One split of the input images, in order.

    Attributes:
      config: with the data's fields and the encoder's image size.
      split: its name.
      source: of its examples.
    """

    config: ConfigDict
    split: str
    source: Source | RecordStream

    @property
    def size(self) -> int:
        """Number of images."""
        return self.source.size

    def name(self, number: int) -> str:
        """Returns the name of the image with an index from 0."""
        return self.source.name(number + getattr(self.source, "start", 0))

    def batches(self, spec: Spec, rows: np.ndarray, bad: deque[str], first: int = 0) -> Iterator[dict[str, Any]]:
        """Yields batches with the evaluation's transform and patches in raster order, from the image `first` on.

        Args:
          spec: shape and dtype of the batches' fields.
          rows: indices of the global batch's rows to yield.
          bad: 'name: reason' is appended for each image that cannot be used; a gray image with `valid` False replaces
            it.
          first: index of the first image.
        """
        config = self.config
        builder = ExampleBuilder(config, PatchOrder("identity", PatchGrid.of(config).shape, num_masked=0), spec)
        if first >= self.size:
            return iter(())
        how: Any = {"ratio": config.eval.crop_ratio[0], "builder": builder, "config": config, "spec": spec,
                    "rows": rows, "bad": bad}
        if isinstance(self.source, RecordStream):
            from mae_jax.data.readers import record_stream  # with TensorFlow

            rest = replace(self.source, start=self.source.start + first, size=self.size - first)
            return record_stream.evaluate(rest, **how)
        return random_access.evaluate(self.source.only(np.arange(first, self.size)), **how)


def of_config(config: ConfigDict, given: ConfigDict | None, split: str, all_splits: bool) -> list[Part]:
    """Opens the splits of a config.

    Args:
      config: the encoder's.
      given: a config whose group `data` replaces that of `config`.
      split: a split expression, as in data.train_split; '': see `all_splits`.
      all_splits: without `split`, True selects all splits of the config; False selects the evaluation split, or the
        training split if there is none.

    Raises:
      UserError: there are no such data.
    """
    span = config.data.range
    config = _readable(config if given is None else with_data(config, given))
    data = config.data
    if data.range == "auto":  # the range is that of the encoder's training data, not of these data
        with config.unlocked():
            data.range = span
    if data.source == "batches":
        raise UserError("data.source='batches' holds patches without names of images; give their folder as --images, "
                        "or another source by --config")
    named = [data.train_split, data.val_split, data.eval_split]
    chosen = [split] if split else named if all_splits else [data.eval_split or data.train_split]
    return [Part(config, each, registry.load(data, each)) for each in dict.fromkeys(filter(None, chosen))]


def of_images(config: ConfigDict, images: str, classes: Sequence[str]) -> Part:
    """Opens the images of a path or pattern as one part.

    Args:
      config: the encoder's.
      images: a file; a folder, whose images at any depth are used; or a pattern, in which ** matches any depth.
      classes: class names of the encoder's head. An image in a folder with a class name has this label; of the fixed
        part of a pattern, only the last folder counts. If (), the top folders are classes, if all images are in two or
        more of them.

    Raises:
      UserError: there are no images.
    """
    root, names, paths = _found(images, config.data.formats)
    tops = {name.split("/")[0] if "/" in name else "" for name in names}
    if not classes and root is not None and len(tops) > 1 and "" not in tops:
        classes = tuple(sorted(tops))
    index = {name: number for number, name in enumerate(classes)}
    above = 0 if root is not None else _fixed(images)
    labels = np.array([_label(name[above:], index) for name in names], np.int32)

    def read(number: int) -> Example:
        path = epath.Path(paths[number]) if root is None else root / paths[number]
        return Example(read_file(path), int(labels[number]))

    source = Source(len(names), read, lambda number: printable(names[number]), tuple(classes),
                    label=lambda number: int(labels[number]))
    return Part(_readable(config), IMAGES, source)


def reopened(about: Mapping[str, Any]) -> list[Part]:
    """Opens the images of a file of features again; the file's `id` is an index over all parts in order.

    Args:
      about: the file's description (`embedding_files.about_of`).

    Raises:
      UserError: the images do not exist any more, or have changed.
    """
    parts = opened_as(about)
    if not same_images(about, parts):
        raise UserError("the images of the features have been renamed, added or removed since")
    return parts


def opened_as(about: Mapping[str, Any]) -> list[Part]:
    """Opens the images at the location of a file of features, changed or not; arguments and errors as in `reopened`."""
    try:
        config = default()
        config.data.image_size = tuple(about["image_size"])
        config.eval.crop_ratio = (about["crop_ratio"],)
        if given := about["source"].get("images"):
            return [of_images(config, given, about["classes"])]
        config.update(from_dict(about["config"]))
        config.data.image_size = tuple(about["image_size"])
        return [Part(_readable(config), split, registry.load(config.data, split)) for split, _ in about["splits"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the file of features does not record where its images are ({type(error).__name__}: {error})"
                        ) from None


def same_images(about: Mapping[str, Any], parts: Sequence[Part]) -> bool:
    """Returns whether parts have the images of a file of features, by their names and order."""
    return [part.source.digest() for part in parts] == about["examples"]


def stored(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields of a config that `reopened` needs, without those that may differ when a call resumes."""
    speed = ("threads", "prefetch", "readers", "shuffle_mb")
    return {"recipe_version": config.recipe_version,
            "data": {name: value for name, value in config.data.to_dict().items() if name not in speed}}


def data_of(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields of a config that identify the data and the preprocessing of images."""
    upright = {"exif": "apply"} if config.data.exif == "apply" else {}  # older clusters do not have this field
    return {name: value for name, value in flat(config.data).items() if name in DATA} | {
        "crop_ratio": config.eval.crop_ratio[0], **upright}


def _readable(config: ConfigDict) -> ConfigDict:
    """Returns a config whose evaluation reads all images in order, with the behavior of its recipe_version."""
    config = read_as_begun(config.copy_and_resolve_references().unlock())
    config.data.update(augment="none", color="none", repeats=1, resize="exact")
    config.eval.max_examples = 1 << 31
    return config.lock()


def _found(images: str, formats: str) -> tuple[epath.Path | None, Sequence[str], Sequence[str]]:
    """Returns the folder (None for a file or a pattern), and the names and paths of the images of `images`."""
    text = normalized(images, "images")
    literal = set("*?[") & set(text) and text.startswith("gs://")
    path = None if literal or not text else locate(text, "images")
    if path is not None and path.is_dir():
        listing = folder_listing.pictures(path, formats=formats)
        return path, listing.pictures, listing.paths
    found = [text] if path is not None and path.is_file() else _glob(text)
    endings = folder_listing.extensions(formats)
    found = [each for each in found if each == text or each.lower().endswith(endings)]
    if not found:
        raise UserError(f"no image matches images={printable(images)!r}; expected a file, a folder, or a pattern such "
                        f"as '/data/**/*.jpg' of {', '.join(endings)}")
    return None, tuple(found), tuple(found)


def _glob(pattern: str) -> list[str]:
    if not pattern.startswith("gs://"):
        return sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    import fsspec

    system, inside = fsspec.core.url_to_fs(pattern)
    return sorted(system.unstrip_protocol(name) for name in system.glob(inside))


def _fixed(images: str) -> int:
    """Returns the length of a pattern's prefix before its last fixed folder."""
    text = normalized(images, "images")
    fixed = text[:min((text.find(each) for each in "*?[" if each in text), default=len(text))]
    return len(fixed.rpartition("/")[0].rpartition("/")[0])


def _label(name: str, index: dict[str, int]) -> int:
    """Returns the label of the innermost folder in an image's path that has a class name; UNLABELED without one."""
    return next((index[part] for part in reversed(name.split("/")[:-1]) if part in index), UNLABELED)
