"""The arguments of a recipe, and what `runlocal` makes of it.

A recipe is made before the command line sets its fields, and `runlocal` has to know which will be.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping

from ml_collections import ConfigDict

from mae_jax import methods
from mae_jax.errors import UserError, did_you_mean

Preset = Callable[[ConfigDict], None]
_given: set[str] = set()  # dotted names


class UnknownArgument(UserError):
    """A recipe has no such argument."""


@contextlib.contextmanager
def given(fields: Collection[str]) -> Iterator[None]:
    """Has the recipe that is made meanwhile know the fields that are set afterwards, by their dotted names."""
    before = set(_given)
    _given.clear()
    _given.update(fields)
    try:
        yield
    finally:
        _given.clear()
        _given.update(before)


def own_data() -> bool:
    """Says whether the command line names data for the recipe's own source, which `runlocal` has to leave alone.

    Where it names the source too, it is another one, and what the recipe says of its own does not hold.
    """
    return bool(_given & {"data.path", "data.name"}) and "data.source" not in _given


def runlocal(config: ConfigDict) -> None:
    """Shrinks a recipe in place until two steps take seconds on a laptop; method and recipe stay.

    So do the data, if the command line says where they are; else photo crops take their place.
    """
    patch = 4
    config.batch_size = 16
    if not own_data():
        config.data.update(source="photo_crops", path="", name="", train_split="train", val_split="",
                           eval_split="test", mask_key="")
        config.checkpoint.best_metric = ""  # it is of the validation part
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
    """Holds a tenth of the training data out that chooses, and leaves the test data alone."""
    config.data.update(train_split="train[:90%]", val_split="train[90%:]")
    config.eval.test = False


def runlocal_with_masks(config: ConfigDict, mosaic: Preset) -> None:
    """Does the same to a recipe that needs images with masks: its preset `mosaic` has embedded ones."""
    own = own_data()
    if not own:
        mosaic(config)
    runlocal(config)
    if not own:
        config.data.update(source="photo_mosaic", mask_offset=0)


def resolve(config: ConfigDict, arg: str, *choices: Mapping[str, Preset], **presets: Preset) -> ConfigDict:
    """Applies the presets named in `arg` (comma-separated) and returns the locked config.

    They apply in the order in which they are passed here, whatever that of `arg`, so that a size can come before what
    depends on it.

    Args:
      config: the recipe.
      arg: what follows the colon in --config=file.py:arg; may be empty.
      *choices: name → function that changes the config in place; of each of these tables `arg` names one at most.
      **presets: the same, for any number. `runlocal` comes last; every recipe knows it, and one that needs other data
        than photo crops has its own.
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
