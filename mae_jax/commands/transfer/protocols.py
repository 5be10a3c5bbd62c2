"""The recipes of a suite, and the cells of its table: data set, protocol and number of blocks."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from mae_jax import methods, presets
from mae_jax.commands import recipes
from mae_jax.commands.transfer.report import ALL, QUICK, Cell, Row
from mae_jax.config import SIZES
from mae_jax.errors import UserError
from mae_jax.param_tree import flat

SHAPE = ("width", "depth", "heads", "patch", "mlp_ratio", "gelu", "layer_scale")  # fields that an encoder decides
OWN_RECIPES = ("detect", "segment", "upernet")  # protocols that are recipes with their own data sets and arguments


class Recipe:
    """A recipe by name or path, its arguments, and the overrides of the command line."""

    def __init__(self, config: str, overrides: dict[str, Any]):
        file, _, self.arg = recipes.locate(config).partition(":")
        self.overrides = overrides
        self.module = _module(Path(file))
        self.stem = Path(file).stem

    def of(self, protocol: str) -> tuple["Recipe", str]:
        """Returns the recipe of a protocol, and the recipe's arguments.

        A protocol is an argument of this recipe, or the name of another one, as 'detect' or 'detect:vitdet_b:cascade'.
        """
        name, _, args = protocol.partition(":")
        if name not in OWN_RECIPES:
            return self, "" if protocol == QUICK else protocol
        return (self if name == self.stem else Recipe(name, self.overrides)), args.replace(":", ",")

    def config(self, data: str, *args: str, encoder: ConfigDict | None = None) -> ConfigDict:
        """Returns the config for further arguments, with the overrides; unlocked.

        A classification recipe takes the shape and the image size of the encoder. Other recipes have their own image
        sizes; `init_from` decides the shape fields that they list in model.auto.

        Args:
          data: one of the recipe's data sets, or 'NAME=PATH' with its path.
          *args: further arguments of the recipe.
          encoder: the config of the encoder, if any.

        Raises:
          UserError: an argument is unknown or names another size than the encoder's, or the recipe lacks an overridden
            field.
        """
        name, at, path = data.partition("=")
        arg = self._joined(self._size(encoder) if encoder else "", name, *args)
        with presets.given(self.overrides):
            config = (self.module.get_config(arg) if arg else self.module.get_config()).unlock()
        if at:
            getattr(self.module, "located", _located)(config, path)
        if encoder and methods.get(config.method.name).task == "classification":
            config.model.update({field: encoder.model[field] for field in SHAPE}, auto=())
            config.data.image_size = encoder.data.image_size
            if encoder.model.positions != "fixed":
                config.model.positions = "learned"
        known = flat(config)
        for field in self.overrides:
            if field not in known:
                raise UserError(f"--config.{field}: the recipe {self.stem} has no such field; give a protocol that has "
                                "it a command of its own, with the same --to")
        config.update_from_flattened_dict(self.overrides)
        return config

    def _size(self, encoder: ConfigDict) -> str:
        """Returns the argument for the encoder's size; '' if the recipe has none, or if it was given."""
        known = getattr(self.module, "SIZES", ())
        given = [name for name in self.arg.split(",") if name in known]
        m = encoder.model
        own = next((name for name, shape in SIZES.items() if shape == (m.width, m.depth, m.heads)), "")
        if own in known and given and given != [own]:
            raise UserError(f"the recipe's argument {','.join(given)} is for another size: the encoder's is {own}; "
                            "leave it out")
        return own if own in known and not given else ""

    def metrics(self, data: str) -> tuple[str, ...]:
        """Returns the recipe's metrics for a data set, first the one that chooses a learning rate; ('',) for none."""
        name = data.partition("=")[0]
        said = self.module.metric(self._joined(name)) if hasattr(self.module, "metric") else ""
        return (said,) if isinstance(said, str) else tuple(said)

    def _joined(self, *args: str) -> str:
        return ",".join(filter(None, (self.arg, *args)))


def _located(config: ConfigDict, path: str) -> None:
    config.data.path = path


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(recipe: Recipe, names: list[str], protocols: list[str], blocks: list[str]) -> tuple[list[Cell], list[Row]]:
    """Returns the cells in the order in which they run, and rows for pairs whose protocol lacks the data set.

    Raises:
      UserError: an invalid number of blocks, a data set that no protocol has, or a protocol with none of the data sets.
    """
    for text in blocks:
        if text != ALL and not (text.replace(".", "", 1).isdecimal() and (float(text) == 0.5 or float(text) % 1 == 0)):
            raise UserError(f"--blocks: {text!r}; write whole numbers, 0.5 (the MLP of the last block) or all")
    names, protocols = (list(dict.fromkeys(given)) or [""] for given in (names, protocols))
    pairs = [(name, protocol) for name in names for protocol in protocols]
    found, unfit = _configs(recipe, pairs)
    for place, given in enumerate((names, protocols)):
        for each in given:
            if all(pair in unfit for pair in pairs if pair[place] == each):
                raise next(error for pair, error in unfit.items() if pair[place] == each)
    cells, rows = [], []
    for name, protocol in pairs:
        data = name or recipe.of(protocol)[0].stem
        if (name, protocol) in unfit:
            rows.append(Row(Cell(data, protocol), "", None, None, None, f"left out: {name} is no data set of "
                            f"{protocol or recipe.stem}", fits=False))
            continue
        frozen = protocol == QUICK or found[name, protocol].method.get("train_blocks") == 0
        cells += [Cell(data, protocol, number) for number in (blocks if blocks and not frozen else [""])]
    folders = [cell.folder for cell in dict.fromkeys(cells)]
    for twice in {folder for folder in folders if folders.count(folder) > 1}:
        raise UserError(f"--names: two of them would be {twice} under --to; rename one of these folders")
    return list(dict.fromkeys(cells)), rows


def _configs(recipe: Recipe, pairs: list[tuple[str, str]]) -> tuple[dict[tuple[str, str], ConfigDict],
                                                                    dict[tuple[str, str], UserError]]:
    """Returns (data set, protocol) → config, and → error for pairs that do not fit."""
    found, unfit = {}, {}
    for name, protocol in pairs:
        own, args = recipe.of(protocol)
        try:
            found[name, protocol] = own.config(name, args)
        except presets.UnknownArgument as error:
            unfit[name, protocol] = error
    return found, unfit
