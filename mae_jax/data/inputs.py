"""Input pipeline: images to batches of permuted uint8 patches. Only the readers of TFDS and TFRecord import TensorFlow.
"""

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data import cluster_ids, labels, object_sizes, objects, token_maps
from mae_jax.data.cluster_ids import Clusters
from mae_jax.data.info import NO_NEEDS, DataInfo, DataNeeds
from mae_jax.data.masking import PatchOrder, View, with_views
from mae_jax.errors import UserError
from mae_jax.ops import example_ids

if TYPE_CHECKING:
    import jax

log = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]
Spec = dict[str, "jax.ShapeDtypeStruct"]
FIELDS = ("patches", "order", "blocks", "label", "id", "valid", "replaced")  # blocks: if the order has any
BAD_NAMES = 100  # replaced images whose names are kept, newest last
_OBJECTS = "sources whose images have objects are coco, digit_scenes and fashion_scenes"
_PROVIDERS = {  # how to provide a field; formatted with the config group `data`
    **dict.fromkeys(objects.FIELDS, _OBJECTS),
    "labels": "data.label_key={0.label_key!r} names no list of classes, nor an array [n, C] of 0 and 1",
    "pixel_label": "data.mask_key={0.mask_key!r} names no masks there",
}


class Inputs(NamedTuple):
    """The input of a run, for one process."""

    train: Callable[[int], Iterator[Batch]]  # step → endless: this process's rows of the batches step, step + 1, ...
    support: Callable[..., Iterator[Batch]]  # the training split with the evaluation's view; finite, padded;
    #   optionally only some ids, if the data have random access
    evaluate: Callable[..., Iterator[Batch]]  # the evaluation split likewise; at a crop ratio, by default the first
    validate: Callable[[], Iterator[Batch]]  # the validation split likewise; both are empty without a split
    extra: Callable[[str], Iterator[Batch]]  # a further test set (eval.sets), with labels of the training classes
    num_train: int
    num_val: int
    classes: tuple[str, ...]  # () without labels of the kind that the method needs
    description: str  # one line
    bad: deque[str]  # 'name: reason' of the images that this process replaced, newest last
    parts: dict[str, Any] = {}  # split expression → its Source or RecordStream; empty for cached batches
    identity: Callable[[], dict[str, Any]] = dict  # identifies the data at another path; {}: unknown


class OpenedData:
    """A config's data, opened: its properties are known, and batches can be made for a method.

    Attributes:
      config: the config with all 'auto' resolved, also data.range, which depends on the data.
      needs: the method's needs.
      info: the properties that a method is built from.
    """

    meta: dict[str, Any]  # set for cached batches alone; the rest for all others:
    train: Any  # the training split, a Source or a RecordStream (data/sources/base.py)
    val: Any  # the validation split likewise, or None
    eval: Any  # the evaluation split likewise, or None
    left_over: range  # records of a stream that no reader reads

    def __init__(self, config: ConfigDict, needs: DataNeeds = NO_NEEDS):
        """Opens the splits of a config, for a method with these needs; raises UserError."""
        self.config, self.needs = config, needs
        clusters = None if needs.clusters is None else Clusters.read(needs.clusters)
        if config.data.source == "batches":
            from mae_jax.data.readers import cached_batches

            self.meta = cached_batches.read_meta(config.data.path)
            several = cached_batches.multi_label(config.data.path, self.meta)
            self.info = DataInfo(self.meta["num_train"], tuple(self.meta["classes"]), several, clusters,
                                 self.meta["num_train"] > example_ids.LARGEST)
            return
        self._open_splits()
        self._decide_range()
        parts = [part for part in (self.train, self.val, self.eval) if part]
        self.info = DataInfo(self.train.size - len(self.left_over), self.train.classes, "labels" in self.train.fields,
                             clusters, max(part.size for part in parts) > example_ids.LARGEST)

    def _open_splits(self) -> None:
        from mae_jax.data.sources import base, registry

        data = self.config.data
        self.train = registry.load(data, data.train_split)
        self.val, self.eval = (registry.load(data, split) if split else None
                               for split in (data.val_split, data.eval_split))
        for key in ("train_split", "eval_split"):
            check_apart(data, "val_split", key)
        for part in (self.val, self.eval):
            _check_classes(part, self.train, data)
        self.left_over = range(0)
        if isinstance(self.train, base.RecordStream):
            from mae_jax.data.readers import record_stream

            self.left_over = record_stream.dropped_records(self.train, self.config, self.needs.mixing_group)

    def _decide_range(self) -> None:
        """Resolves data.range=auto in the config; logs the result if images have more than 8 bits."""
        from mae_jax.data import value_range

        if self.config.data.range == "auto":
            self.config = self.config.copy_and_resolve_references()
            self.config.data.range, text = value_range.chosen(self.train, self.config.data)
            if text:
                log.info(text)

    def check_labels(self) -> None:
        """Raises UserError if a classifier would train, or be evaluated, without labels or with other classes."""
        if self.config.data.source == "batches":
            labels.check_batches(self.config)
            return
        read = {"train_split": self.train, "val_split": self.val,
                "eval_split": self.eval if self.config.eval.test else None}
        labels.check(self.config.data, {field: part for field, part in read.items() if part})

    def check_masks(self, classes: int) -> None:
        """Raises UserError if masks have one class because their other values are none; see `labels.check_masks`."""
        if self.config.data.source != "batches" and "pixel_label" in self.train.fields:
            labels.check_masks(self.train, classes, self.config.data.train_split)

    def warn_of_sizes(self) -> None:
        """Logs a warning if the anchors of a detector do not fit the objects; see `object_sizes.warn`."""
        if self.config.data.source != "batches" and getattr(self.train, "annotations", None):
            object_sizes.warn(self.train, self.config)

    def batches(self, spec: Spec, order: PatchOrder, views: tuple[View, ...] = (),
                rows: np.ndarray | None = None) -> Inputs:
        """Returns the input, whose batches are dicts of NumPy arrays with the fields of `spec`.

        Fields of all data:
          patches: uint8 [B, N, P], permuted.
          order: int32 [B, N]; order[b, k] is the raster index of the k-th patch.
          blocks: int32 [B, M, K], indices in the order, if it has blocks.
          label: int32 [B], -1 if unlabeled.
          id: int32 [B], or [B, 2] if 31 bits do not count the examples (ops/example_ids.py); -1 in padding.
          valid: float32 [B], 0 for gray stand-ins and padding.
          replaced: int32 [B], how many images failed before this one.

        Fields of some data:
          labels: uint8 [B, C], 1 where a class is in the image.
          pixel_label: uint8 [B, N, P / 3], the class of each pixel, 255 for none.
          tokens: int32 [B, N], from the file data.tokens.
          cluster: int32 [B], from the folder that the method needs.
          box, box_class, box_valid, box_mask: float32 [B, M, 4], int32 [B, M], float32 [B, M], uint8 [B, M, 1568], for
            M objects per image (`transforms/detection.fields`).
          size, original_size: int32 [B, 2], of images with objects.

        Args:
          spec: field → global shape [B, ...] and dtype, for evaluations.
          order: how the method masks patches.
          views: views whose fields replace `patches` and `order` in training batches; () for none.
          rows: the global rows that this process feeds; None: all of them.

        Raises:
          UserError: the data cannot provide a field of the spec.
        """
        config, clusters = self.config, self.info.clusters
        rows = np.arange(config.batch_size) if rows is None else np.asarray(rows)
        if config.data.source == "batches":
            from mae_jax.data.readers import cached_batches

            return Inputs(**cached_batches.open_folder(config, self.meta, self.info, spec, views, order, rows))
        inputs = self._read(spec, order, rows, views)
        if token_maps.FIELD in spec:
            sizes = {split: part.size for split, part in inputs.parts.items()}
            tokens = token_maps.load(config, sizes, spec[token_maps.FIELD].shape[1], self.needs.vocabulary)
            inputs = _joined(config.data, inputs, token_maps.joined, tokens)
            inputs = inputs._replace(identity=functools.partial(_with_tokens, inputs.identity, tokens))
        if cluster_ids.FIELD in spec:
            if self.needs.clusters is None or clusters is None:
                raise UserError(f"method.name={config.method.name!r} asks for the batch field {cluster_ids.FIELD!r}, "
                                "but its data_needs name no folder of mae_jax cluster")
            assigned = cluster_ids.of_splits(clusters, self.needs.clusters, config.data, inputs.parts)
            inputs = _joined(config.data, inputs, cluster_ids.joined, assigned)
        return _in_words(inputs) if self.info.wide_ids else inputs

    def _read(self, spec: Spec, order: PatchOrder, rows: np.ndarray, views: tuple[View, ...]) -> Inputs:
        """Builds the input from sources and streams, without the fields that are joined by id."""
        import jax  # which worker processes avoid

        from mae_jax.data.readers import random_access
        from mae_jax.data.sources import base, registry
        from mae_jax.data.transforms.graph_builder import builder

        config, data, source = self.config, self.config.data, self.train
        splits = {data.train_split: source, data.val_split: self.val, data.eval_split: self.eval}
        parts = {split: part for split, part in splits.items() if part}
        if token_maps.FIELD in spec and any(isinstance(part, base.RecordStream) for part in parts.values()):
            raise UserError(f"data.tokens={data.tokens!r} needs a source with random access, such as folder, npz, or "
                            f"TFDS stored as array_record; data.source={data.source!r} is a stream here")
        later = (token_maps.FIELD, cluster_ids.FIELD)  # joined by the examples' ids
        spec = {name: struct for name, struct in spec.items() if name not in later}
        if self.info.wide_ids:  # on the host an id is one number
            spec["id"] = jax.ShapeDtypeStruct((config.batch_size,), np.int64)
        for part in (source, self.val, self.eval):
            _check_fields(part, spec, data)
        if source.size < order.group:
            raise UserError(f"data.train_split={data.train_split!r} has {source.size} images, but {order.group} are "
                            "needed for a mix")
        bad: deque[str] = deque(maxlen=BAD_NAMES)
        common = {"builder": builder(config, order, spec, views), "config": config, "rows": rows, "bad": bad}

        def reader(part: base.Source | base.RecordStream) -> Any:
            if isinstance(part, base.RecordStream):
                from mae_jax.data.readers import record_stream  # imports TensorFlow

                return record_stream
            return random_access

        def evaluate(part: base.Source | base.RecordStream | None, ratio: float = config.eval.crop_ratio[0]
                     ) -> Iterator[Batch]:
            return reader(part).evaluate(part, ratio, spec=spec, **common) if part else iter(())

        def support(ids: np.ndarray | None = None) -> Iterator[Batch]:
            if ids is None:
                return evaluate(source)
            assert isinstance(source, base.Source)  # a stream has no access by id
            return _renumbered(evaluate(source.only(ids)), "id", ids)

        def extra(name: str) -> Iterator[Batch]:
            found, classes = registry.open_test_set(data, name, source.classes)
            _check_fields(found, spec, data)
            return _renumbered(evaluate(found), "label", classes)

        return Inputs(
            train=functools.partial(reader(source).train, source, spec=with_views(spec, views), **common),
            support=support, evaluate=functools.partial(evaluate, self.eval),
            validate=functools.partial(evaluate, self.val), extra=extra,
            num_train=self.info.num_train, num_val=self.val.size if self.val else 0,
            # With any number of labels per image, the batch field `label` is not set.
            classes=self.info.classes if "labels" in spec else self.info.single_label_classes,
            bad=bad, description=self._describe(), parts=parts,
            identity=functools.cache(lambda: {split: part.identity() for split, part in parts.items()}))

    def _describe(self) -> str:
        from mae_jax.data.sources import registry

        opened = {"train_split": self.train, "val_split": self.val, "eval_split": self.eval}
        told = registry.describe(self.config.data, {field: part for field, part in opened.items() if part})
        if told:
            return told
        data, classes = self.config.data, len(self.train.classes)
        where = data.name or data.path
        named = f"{classes} classes" if classes else "no labels"
        chosen_by = f"{self.val.size} in {data.val_split}, " if self.val else ""
        lost = ""
        if self.left_over:
            lost = (f"; left out by {data.readers} readers: {len(self.left_over)}, from "
                    f"{self.train.name(self.left_over[0])}")
        return (f"{data.source}{f' {where}' if where else ''}: {self.train.size} images in {data.train_split}, "
                f"{chosen_by}{self.eval.size if self.eval else 0} in {data.eval_split or 'no evaluation split'}; "
                f"{named}{lost}")


def _joined(data: ConfigDict, inputs: Inputs, join: Callable[..., Any], tables: dict[str, np.ndarray]) -> Inputs:
    """Adds a field to all batches from a table per split, by example id."""
    parts = {"train": data.train_split, "support": data.train_split, "validate": data.val_split,
             "evaluate": data.eval_split}
    made = {name: join(getattr(inputs, name), tables[split]) for name, split in parts.items() if split}
    return inputs._replace(**made)


def _in_words(inputs: Inputs) -> Inputs:
    """Splits the ids of all batches into two words for the devices, int32 [B, 2]."""
    def made(make: Callable[..., Iterator[Batch]], *args: Any) -> Iterator[Batch]:
        for batch in make(*args):
            yield {**batch, "id": example_ids.words(batch["id"])}

    names = ("train", "support", "evaluate", "validate", "extra")
    renewed: dict[str, Any] = {name: functools.partial(made, getattr(inputs, name)) for name in names}
    return inputs._replace(**renewed)


def _with_tokens(identity: Callable[[], dict[str, Any]], tokens: dict[str, np.ndarray]) -> dict[str, Any]:
    from mae_jax.data.identity import sampled, short_hash

    return {**identity(), "data.tokens": {
        split: short_hash(row.tobytes() for row in maps[sampled(len(maps))]) for split, maps in tokens.items()}}


def check_apart(data: ConfigDict, first: str, second: str) -> None:
    """Raises UserError if two splits of the config, given by their field names, may share images."""
    from mae_jax.data.sources import registry
    from mae_jax.data.sources import splits as sources_splits

    if data.source == "batches":  # a folder of a single split
        return
    some, others = (sources_splits.parts(data[key]) if data[key] else [] for key in (first, second))
    if any(registry.same_split(data, one.name, other.name) and sources_splits.overlap(one, other)
           for one in some for other in others):
        raise UserError(f"data.{first}={data[first]!r} shares images with data.{second}={data[second]!r}, or may; "
                        "take parts that do not overlap, such as 'train[:90%]', 'train[90%:]' and 'test'")


def _check_classes(part: Any, source: Any, data: ConfigDict) -> None:
    """Raises UserError if a split has a class that the training split lacks, or has its classes in another order."""
    if part and source.classes and list(part.classes) != [name for name in source.classes if name in part.classes] and (
            set(part.classes) <= set(source.classes)):
        raise UserError(f"data.source={data.source!r}: the classes of the held-out images have another order than "
                        f"those of data.train_split={data.train_split!r}, so that equal numbers are different classes: "
                        f"{labels.some(part.classes)}, and {labels.some(source.classes)}")
    unknown = sorted(set(part.classes) - set(source.classes)) if part and source.classes else []
    if unknown:
        raise UserError(f"data.source={data.source!r}: {len(unknown)} classes of the held-out images are not in "
                        f"data.train_split={data.train_split!r}, such as {unknown[0]!r}; its classes are "
                        f"{labels.some(source.classes)}")


def _check_fields(part: Any, spec: Spec, data: ConfigDict) -> None:
    """Raises UserError if a split cannot provide a field of the spec; `part` is None without a split."""
    given = (*FIELDS, *(part.fields if part else ("labels", "pixel_label", *objects.FIELDS)))
    for name in spec:
        if name not in given:
            hint = _PROVIDERS.get(name, f"it gives {', '.join(given)}").format(data)
            raise UserError(f"data.source={data.source!r} has no batch field {name!r}; {hint}")
    if part and "labels" in spec and spec["labels"].shape[1] != len(part.classes):
        raise UserError(f"data.label_key={data.label_key!r} has {len(part.classes)} classes, but the method expects "
                        f"{spec['labels'].shape[1]}")


def _renumbered(batches: Iterator[Batch], name: str, numbers: np.ndarray) -> Iterator[Batch]:
    """Yields the batches with numbers[k] for each k in a field; negative values stay."""
    for batch in batches:
        yield {**batch, name: np.where(batch[name] < 0, batch[name], numbers[batch[name]]).astype(batch[name].dtype)}
