"""Presets: the arguments of a recipe (--config=file.py:ARG), and the preset `runlocal` that all recipes share.

A recipe is built before the command line overrides its fields, but `runlocal` depends on the overrides; `given`
announces them.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping

from ml_collections import ConfigDict

from mae_jax import methods
from mae_jax.errors import UserError, did_you_mean

Preset = Callable[[ConfigDict], None]
_given: set[str] = set()  # dotted names of the fields that the command line overrides


class UnknownArgument(UserError):
    """A recipe does not have a given argument."""


@contextlib.contextmanager
def given(fields: Collection[str]) -> Iterator[None]:
    """Announces, while a recipe is built, the dotted names of the fields that will be overridden afterwards."""
    before = set(_given)
    _given.clear()
    _given.update(fields)
    try:
        yield
    finally:
        _given.clear()
        _given.update(before)


def own_data() -> bool:
    """Returns whether the command line sets data.path or data.name, but not data.source.

    The data then belong to the recipe's own source, so `runlocal` must keep the recipe's data fields. They do not apply
    if data.source is set too.
    """
    return bool(_given & {"data.path", "data.name"}) and "data.source" not in _given


def runlocal(config: ConfigDict) -> None:
    """Shrinks a recipe in place to two steps of a tiny model, which take seconds on a laptop.

    Data given on the command line stay; otherwise photo crops replace the recipe's data.
    """
    patch = 4
    config.batch_size = 16
    if not own_data():
        config.data.update(source="photo_crops", path="", name="", train_split="train", val_split="",
                           eval_split="test", mask_key="")
        config.checkpoint.best_metric = ""  # it would need a validation split
    config.data.image_size = (8 * patch, 8 * patch)
    config.model.update(width=48, depth=2, heads=3, patch=(patch, patch), auto=())
    config.method.update(methods.small(config.method.name))
    config.train.duration = "2 steps"
    config.optim.warmup = "1 steps"
    config.checkpoint.every = "2 steps"
    config.eval.every = "2 steps"
    config.log.every = "1 steps"
    config.eval.update(max_examples=64, sets=())


def held(config: ConfigDict) -> None:
    """Holds out a tenth of the training data for selection, and disables the evaluation on test data."""
    config.data.update(train_split="train[:90%]", val_split="train[90%:]")
    config.eval.test = False


def runlocal_with_masks(config: ConfigDict, mosaic: Preset) -> None:
    """Applies `runlocal` to a recipe for images with masks; its preset `mosaic` selects embedded images with masks."""
    own = own_data()
    if not own:
        mosaic(config)
    runlocal(config)
    if not own:
        config.data.update(source="photo_mosaic", mask_offset=0)


def resolve(config: ConfigDict, arg: str, *choices: Mapping[str, Preset], **presets: Preset) -> ConfigDict:
    """Applies the presets named in `arg` and returns the locked config.

    Presets are applied in the order of the parameters, not of `arg`, so that a size precedes the presets that depend on
    it. `runlocal` is always known and comes last; recipes that need other data than photo crops pass their own.

    Args:
      config: the recipe.
      arg: the comma-separated text after the colon in --config=file.py:arg; may be empty.
      *choices: tables of name → function that changes the config in place; `arg` may name at most one of each table.
      **presets: name → such a function; `arg` may name any number of them.

    Raises:
      UserError: `arg` names an unknown preset, or two presets that exclude each other.
    """
    known = {name: change for table in (*choices, presets) for name, change in table.items()}
    known["runlocal"] = known.pop("runlocal", runlocal)
    names = [name for name in arg.split(",") if name]
    for name in names:
        if name not in known:
            raise UnknownArgument(f"unknown config argument {name!r}; {did_you_mean(name, known)}")
    for table in choices:
        named = [name for name in table if name in names]
        if len(named) > 1:
            raise UserError(f"the config arguments {' and '.join(map(repr, named))} exclude each other")
    for name, change in known.items():
        if name in names:
            change(config)
    config.model.auto = tuple(field for field in config.model.auto if f"model.{field}" not in _given)
    return config.lock()
