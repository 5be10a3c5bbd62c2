"""Compatibility with stored runs: changes of behavior by `recipe_version`, and former names of fields.

A run keeps the `recipe_version` that it was started with, and the behavior of that version, through resumes,
evaluations and exports. A new run has the newest version. Runs of package 0.1.0, whose config.json has no version, have
version 1.

To change what a config trains: add 1 to `CURRENT` and a row to `BEHAVIORS`, keep the code of the old behavior, choose
between the two by `has`, and name in tests/recipe_version_test.py the stored workdir that shows the difference. To
rename a field: add a row to `FIELDS` or `BATCH_FIELDS`; a former name is never used for another field. The tables of
docs/migration.md have the same rows. The files of a workdir have kept their names.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import mae_jax
from mae_jax.errors import UserError

CURRENT = 6  # version of new runs


class Behavior(NamedTuple):
    """A change of what a config trains: the first recipe_version with it, the old behavior, and the new one."""

    since: int
    before: str
    now: str


BEHAVIORS: dict[str, Behavior] = {
    "published_blocks": Behavior(
        2,
        "`method.masking=block` masked single patches once fewer than 16 patches were left to mask",
        "blocks are drawn as in BEiT's released code; the patches then missing (of 14 x 14, less than one on average) "
        "are masked singly"),
    "folder_layouts": Behavior(
        3,
        "`data.source=folder` recognized only the splits `train/` and `test/`, `val/` or `validation/`, had no classes "
        "if any image lay beside the class folders, and read files that NAS devices and image viewers add; "
        "`data.layout=0.1.0` still does so",
        "splits are recognized by all usual names, also in a wrapping folder or inside class folders; images beside "
        "class folders and such added files are skipped; lists of labels are read; names are compared in Unicode NFC; "
        "ambiguous folders are refused"),
    "class_names_before_numbers": Behavior(
        3,
        "numbers in `data.classes` were always indices into the sorted names: for folders named 0 to 11, `10-11` "
        "selected 8 and 9",
        "if the names of the classes are numbers, numbers in `data.classes` are names"),
    "exif_orientation": Behavior(
        4,
        "the EXIF orientation was ignored; `data.exif=ignore` still does so",
        "images, and masks with them, are rotated to their EXIF orientation, as viewers show them"),
    "range_of_16_bits": Behavior(
        5,
        "16-bit images were reduced to their upper 8 bits, so that 12-bit images in 16-bit files were nearly black; "
        "`data.range=upper` still does so",
        "a range of values is mapped to 0 to 255: `data.range`, by default all bits that the training images use"),
    "more_formats": Behavior(
        5,
        "TIFF, AVIF and HEIC files were skipped, in folders and tars by their names; `data.formats=common` still does "
        "so",
        "they are read"),
    "computed_order": Behavior(
        5,
        "the order of an epoch of data with random access was drawn as a whole, with 8 bytes of memory per example",
        "the example at each position of the order is computed, for a data set of any size (`mae_jax/rng.py`)"),
    "beit_start_and_decay": Behavior(
        6,
        "BEiT's kernels with `model.init=normal`, its tokens and its head were initialized from a normal distribution "
        "with standard deviation 0.02, and its class token had weight decay",
        "as in BEiT's released code: with `model.init=normal`, the normal distribution is truncated at one standard "
        "deviation (which leaves 0.0108), the last kernels of the k-th block's branches are divided by √(2 k), and the "
        "class token has no weight decay"),
}


class Renamed(NamedTuple):
    """The current name of a renamed field."""

    now: str
    since: str  # version of the package that renamed it
    method: str = ""  # the only method whose field was renamed; '': all


FIELDS: dict[str, Renamed] = {  # former dotted path of a config field → current one
    "data.colour": Renamed("data.color", "0.2.0"),
    "method.normalise": Renamed("method.normalize", "0.2.0", method="splitmask"),
    "checkpoint.best": Renamed("checkpoint.best_metric", "0.2.0"),
}
BATCH_FIELDS: dict[str, Renamed] = {  # former name of a stored batch's field (data.source=batches) → current one
    "mask": Renamed("pixel_label", "0.2.0"),
}


def has(config: ConfigDict, behavior: str) -> bool:
    """Returns whether a run has the new behavior of a row of BEHAVIORS."""
    return config.recipe_version >= BEHAVIORS[behavior].since


def check(version: int) -> None:
    """Raises UserError for a recipe_version that this package does not know."""
    if not 1 <= version <= CURRENT:
        newer = "install the newer mae_jax that has it, or " if version > CURRENT else ""
        raise UserError(f"recipe_version={version}; mae_jax {mae_jax.__version__} knows 1 to {CURRENT}: {newer}"
                        "leave it out, for a new run")


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the fields of a stored config (nested dicts) to current names, and adds recipe_version 1 if missing.

    Raises:
      UserError: this package does not know its recipe_version.
      ValueError: the config has a field under both its names.
    """
    out: dict[str, Any] = {"recipe_version": 1, **{key: {**value} if isinstance(value, Mapping) else value
                                                   for key, value in values.items()}}
    check(out["recipe_version"])
    for old, renamed in FIELDS.items():
        (group, before), (_, now) = old.split("."), renamed.now.split(".")
        if before not in out.get(group, ()) or renamed.method not in ("", out.get("method", {}).get("name")):
            continue
        if now in out[group]:
            raise ValueError(f"it has both {old} and {renamed.now}")
        out[group][now] = out[group].pop(before)
    return out


def stored_name(field: str, present: Collection[str]) -> str:
    """Returns the name under which stored batches hold a field: the former name if only that is present."""
    before = {renamed.now: old for old, renamed in BATCH_FIELDS.items()}
    return field if field in present or before.get(field, field) not in present else before[field]


def former(field: str) -> str:
    """Returns the current name of a renamed config field for an error message; '' if it was not renamed.

    `field` is a former dotted path or its last part.
    """
    found = [f"{old} is {renamed.now} since mae_jax {renamed.since}" for old, renamed in FIELDS.items()
             if field in (old, old.split(".")[-1])]
    return "; ".join(found)
