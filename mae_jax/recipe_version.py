"""What changed after runs were stored: behaviors by `recipe_version`, and names that fields have had before.

A run keeps the `recipe_version` that it began with, through resumes, evaluations and exports, and with it the behaviors
of that version; a new run has the newest. A run of package 0.1.0, whose config.json does not say, has version 1.

To change what a config trains: add 1 to `CURRENT` and a row to `BEHAVIORS`, keep what was beside what is, choose by
`has`, and say in tests/recipe_version_test.py which stored workdir shows it. To rename a field: a row of `FIELDS` or
`BATCH_FIELDS`; a name that a field once had is never given to another one. docs/migration.md has the same rows. Files
of a workdir have kept their names.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import mae_jax
from mae_jax.errors import UserError

CURRENT = 6  # of new runs


class Behavior(NamedTuple):
    """What a config trains otherwise than before."""

    since: int  # the recipe_version
    before: str
    now: str


BEHAVIORS: dict[str, Behavior] = {
    "published_blocks": Behavior(
        2,
        "`method.masking=block` drew no block once fewer than 16 patches were left, and filled up with single patches",
        "blocks as BEiT's released code draws them; what is then missing (of 14 x 14, less than one patch on average) "
        "is added singly"),
    "folder_layouts": Behavior(
        3,
        "`data.source=folder` knew splits as `train/` beside `test/`, `val/` or `validation/` alone, had no classes "
        "once an image lay beside their folders, and read what NAS and viewers leave; `data.layout=0.1.0` reads so",
        "splits by all their usual names, also in a wrapping folder or inside of classes; strays beside class folders "
        "and droppings are left out; lists of labels; names compare in Unicode NFC; two readings are refused"),
    "class_names_before_numbers": Behavior(
        3,
        "numbers in `data.classes` were places in the sorted names, also where names are numbers: of folders 0 to 11, "
        "`10-11` were 8 and 9",
        "where the names of classes are numbers, these are meant"),
    "exif_orientation": Behavior(
        4,
        "pixels as they are stored, whatever EXIF said; `data.exif=ignore` reads so",
        "images are turned as their EXIF says, as people see them, and their masks with them"),
    "range_of_16_bits": Behavior(
        5,
        "of 16 bits the upper 8 were taken, so that images of 12 bits in files of 16 were nearly black; "
        "`data.range=upper` reads so",
        "a range of values becomes 0 to 255: `data.range`, by default all bits that the training images have"),
    "more_formats": Behavior(
        5,
        "TIFF, AVIF and HEIC were no images, in folders and tars by their names; `data.formats=common` reads so",
        "they are read"),
    "computed_order": Behavior(
        5,
        "the order of an epoch of data with random access was drawn as a whole: 8 bytes of memory for each example",
        "the example at each place of the order is computed, whatever the size (`mae_jax/rng.py`)"),
    "beit_start_and_decay": Behavior(
        6,
        "BEiT's kernels with `model.init=normal`, its tokens and its head started from a normal of deviation 0.02, and "
        "its class token decayed",
        "as BEiT's released code: with `model.init=normal` the normal is cut at one deviation (which leaves 0.0108), "
        "the last kernels of the k-th block's branches are divided by the root of 2 k; the class token does not decay"),
}


class Renamed(NamedTuple):
    """Today's name of what had another one."""

    now: str
    since: str  # version of the package
    method: str = ""  # whose field it is; '': of every config


FIELDS: dict[str, Renamed] = {  # of the config, by dotted path
    "data.colour": Renamed("data.color", "0.2.0"),
    "method.normalise": Renamed("method.normalize", "0.2.0", method="splitmask"),
    "checkpoint.best": Renamed("checkpoint.best_metric", "0.2.0"),
}
BATCH_FIELDS: dict[str, Renamed] = {  # as folders of data.source=batches store them
    "mask": Renamed("pixel_label", "0.2.0"),
}


def has(config: ConfigDict, behavior: str) -> bool:
    """Says whether a run has what is now the behavior."""
    return config.recipe_version >= BEHAVIORS[behavior].since


def check(version: int) -> None:
    """Raises UserError for a recipe_version that is not known here."""
    if not 1 <= version <= CURRENT:
        newer = "install the newer mae_jax that has it, or " if version > CURRENT else ""
        raise UserError(f"recipe_version={version}; mae_jax {mae_jax.__version__} knows 1 to {CURRENT}: {newer}"
                        "leave it out, for a new run")


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested fields of a stored config under today's names, with its recipe_version.

    Raises:
      UserError: its recipe_version is not known here.
      ValueError: a field is there under both its names.
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
    """Returns the name that a batch field has among those present: today's, or the one that it had before."""
    before = {renamed.now: old for old, renamed in BATCH_FIELDS.items()}
    return field if field in present or before.get(field, field) not in present else before[field]


def former(field: str) -> str:
    """Returns what a former name of a config field, dotted or its last word, is now, for an error line; or ''."""
    found = [f"{old} is {renamed.now} since mae_jax {renamed.since}" for old, renamed in FIELDS.items()
             if field in (old, old.split(".")[-1])]
    return "; ".join(found)
