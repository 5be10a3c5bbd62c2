"""Label checks before the first step: the splits have labels, and training covers their classes."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.decode import IGNORED
from mae_jax.data.samples import of_sample
from mae_jax.errors import UserError, pluralize, printable
from mae_jax.storage.npz import opened
from mae_jax.storage.paths import locate

log = logging.getLogger(__name__)

MAX_NAMED = 8  # classes listed in a message
AT_HAND = ("folder", "npz", "parquet", "table", "tar")  # sources that know all labels without reading images
OTHER = "; name another split that has, or train without:"
WITHOUT = {"train_split": "", "val_split": f"{OTHER} --config.data.val_split=''",
           "eval_split": f"{OTHER} --config.eval.test=False"}  # which a run may change on its way


def check(data: ConfigDict, parts: Mapping[str, Any]) -> None:
    """Raises UserError if a split has no labels, or has classes that the training split lacks.

    Args:
      data: the config group `data`.
      parts: 'train_split', and the other splits that are read → a Source or RecordStream with one label per image.
    """
    train = parts["train_split"]
    ours = f"the classes of data.train_split={data.train_split!r} are {some(train.classes)}"
    for field, part in parts.items():
        without = WITHOUT[field]
        unknown = () if part is train else getattr(part, "unknown_classes", ())
        if unknown:
            raise UserError(f"data.{field}={data[field]!r} has classes that are not trained on: {some(unknown)}; {ours}"
                            f". Give equal classes equal names, or remove those images{without}")
        if not labeled(part):
            theirs = "" if part is train else f"; it has neither class folders nor a list of labels, {ours}" \
                if data.source == "folder" else f"; {ours}"
            raise UserError(f"data.{field}={data[field]!r} has no image with a label, and a classifier needs them"
                            f"{theirs}{without}")
        if data.source in AT_HAND and part is not train and part.label:
            present = {part.label(i) for i in range(part.size)}
            missing = [name for number, name in enumerate(part.classes) if number not in present]
            if missing:
                log.warning("data.%s=%r has no image of %d of the %d classes: %s", field, data[field], len(missing),
                            len(part.classes), some(missing))


def check_batches(config: ConfigDict) -> None:
    """Raises UserError if the cached batches of a split that is read have no label."""
    stored = {"train_split": "train", "val_split": "validate", "eval_split": "evaluate" if config.eval.test else ""}
    for field, name in stored.items():
        file = locate(config.data.path, "data.path") / f"{name}.npz"
        if name and file.is_file():
            with opened(file) as arrays:
                found = "label" not in arrays.files or (arrays["label"] >= 0).any()
            if not found:
                raise UserError(f"{file} has no image with a label, and a classifier needs them{WITHOUT[field]}")


def check_masks(part: Any, classes: int, split: str) -> None:
    """Logs which values of masks count nowhere, as `inspect` does; looks at 64 masks.

    Args:
      part: the training split, a Source or RecordStream with masks.
      classes: C; classes are 0 to C - 1.
      split: expression of the split, for the message.

    Raises:
      UserError: one class is all that is left of the masks, because their other values are no classes.
    """
    found = of_sample(part, lambda example: np.unique(example.mask))
    if not found:
        return
    values = np.unique(np.concatenate([each for _, each in found]))
    known, beyond = values[values < classes], values[(values >= classes) & (values != IGNORED)]
    seen = some(map(str, values))
    if len(known) < 2 and len(values) > len(known):
        raise UserError(f"the masks of data.train_split={split!r} have the values {seen} "
                        f"({pluralize(len(found), 'mask')} looked at), of which {some(map(str, known))} alone counts: "
                        f"classes are 0 to {classes - 1}, by method.classes={classes}, and {IGNORED} is ignored. Store "
                        "masks with the numbers of the classes, or set data.mask_offset, which is subtracted")
    if len(known) < 2:
        log.warning("the masks of data.train_split=%r have the value %s alone (%s looked at)", split, seen,
                    pluralize(len(found), "mask"))
    elif len(beyond):
        name = next(part.name(number) for number, each in found if beyond[-1] in each)
        log.warning("masks of data.train_split=%r have values that are not trained on: %s (%s); method.classes=%d has "
                    "0 to %d", split, some(map(str, beyond)), printable(name), classes, classes - 1)


def labeled(part: Any) -> bool:
    """Returns whether a Source or RecordStream has any label; reads examples up to the first labeled one."""
    from mae_jax.data.sources.base import RecordStream

    if "labels" in part.fields:
        return True
    if not part.classes:
        return False
    if isinstance(part, RecordStream):
        from mae_jax.data.readers import record_stream

        return bool(part.label_key) and any(fields[1] >= 0 for _, fields in record_stream.stored(part, []))
    return any((part.label or (lambda i: _read(part, i)))(i) >= 0 for i in range(part.size))


def _read(part: Any, i: int) -> int:
    from mae_jax.data.decode import BadImage

    try:
        return int(part.read(i).label)
    except (BadImage, OSError):
        return -1


def some(names: Iterable[str]) -> str:
    """Returns the first MAX_NAMED names, and how many more there are, as text."""
    known = list(names)
    more = f" and {len(known) - MAX_NAMED} more" if len(known) > MAX_NAMED else ""
    return (", ".join(map(printable, known[:MAX_NAMED])) or "none") + more
