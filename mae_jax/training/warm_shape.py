"""The encoder's shape of weights that training starts from: where the recipe leaves it open, and to compare it.

A recipe names the open fields in `model.auto`. They are closed before the run begins: config.json holds what was taken,
and a resumed run does not look again.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.config import SHAPE, SIZES
from mae_jax.errors import UserError
from mae_jax.interop import layouts
from mae_jax.param_tree import flatten
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import workdir

logger = logging.getLogger(__name__)

HEADS = {width: heads for width, _, heads in SIZES.values()}  # of the published ViTs, which no shape shows
GELUS = {"gelu": "erf", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_tanh": "tanh"}  # theirs → ours
LAYER_SCALE = 1e-4  # where such a model would start (DeiT III); all of it is then loaded


def with_shape(config: ConfigDict) -> ConfigDict:
    """Returns the config with the shape of `init_from` in its open fields, and none open; says what was taken.

    Without `init_from` they keep what the recipe has.

    Raises:
      UserError: nothing is there, or its number of heads is not known.
    """
    if not config.model.auto:
        return config
    config = config.copy_and_resolve_references()
    asked, before = config.model.auto, config.model.copy_and_resolve_references()
    config.model.auto = ()
    if config.init_from:
        found, notes = shape_of(config.init_from, "heads" in asked)
        taken = {field: found[field] for field in asked if field in found}
        config.model.update(taken)
        said = ", ".join(f"{field}={value}" for field, value in taken.items())
        if before.width != config.model.width or before.depth != config.model.depth:
            notes.append(f"all else is what the recipe has for an encoder of width {before.width} and depth "
                         f"{before.depth}, and may name other sizes, as finetune:L")
        logger.info("init_from %s: model.%s are those of its weights%s", config.init_from, said,
                    "".join(f"; {note}" for note in notes))
    return config.lock()


def shape_of(source: str, heads: bool = True) -> tuple[dict[str, Any], list[str]]:
    """Returns field of config.model → value, of the encoder that a source holds, and notes on where they are from.

    Args:
      source: as config.init_from.
      heads: whether their number must be known.

    Raises:
      UserError: nothing is there, or the number of heads or the shape of patches is not known.
    """
    theirs = workdir.config_of(source)
    if theirs is not None:
        found = {field: theirs.model[field] for field in SHAPE if field != "positions"}
        return found | ({"positions": "learned"} if theirs.model.positions != "fixed" else {}), []
    params = layouts.read(load_params(source), None)
    if not isinstance(params, Mapping) or "patch_embed" not in params.get("encoder", {}):
        raise UserError(f"init_from={source}: {layouts.strange(flatten(params))}")
    found, notes = of_weights(source, params)
    if heads and "heads" not in found:
        raise UserError(f"init_from={source} does not say how many heads it has, and no published ViT has its width "
                        f"{found['width']}; say it with --config.model.heads")
    return found, notes


def of_weights(source: str, params: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns field of config.model → value, of weights without a config of ours, and notes on where they are from.

    Heads are left out where nothing tells how many they are, `gelu` where nothing says which.

    Args:
      source: the file or folder, beside which a config.json may lie.
      params: in our names.

    Raises:
      UserError: the shape of patches is not known, or MLPs are no whole number of times as wide as tokens.
    """
    found, notes, said = of_params(params), [], workdir.described(source)
    if not isinstance(found.get("mlp_ratio", 0), int):
        raise UserError(f"{source}: its MLPs are {found['mlp_ratio']:g} times as wide as its tokens; ours take a whole "
                        "number (model.mlp_ratio)")
    patch = said.get("patch_size")
    rows = np.shape(params["encoder"]["patch_embed"]["kernel"])[0]
    side = math.isqrt(rows // 3)
    if isinstance(patch, list) and list(map(type, patch)) == [int, int] and 3 * math.prod(patch) == rows:
        found["patch"] = tuple(patch)
    elif 3 * side * side == rows:
        found["patch"] = (side, side)
    else:
        raise UserError(f"{source}: its patches have {rows} values, which are those of no square in RGB, and nothing "
                        "says their size; a recipe may, with --config.model.patch")
    if gelu := GELUS.get(str(described_as(said, "hidden_act", "act_layer"))):
        found["gelu"] = gelu
    number, width = described_as(said, "num_attention_heads", "num_heads"), found["width"]
    if type(number) is int and number > 0:
        found["heads"] = number
        notes.append("heads by its config.json")
    elif width in HEADS:
        found["heads"] = HEADS[width]
        notes.append(f"it does not say how many heads it has: {HEADS[width]}, as published ViTs of width {width}")
    return found, notes


def described_as(said: Mapping[str, Any], transformers: str, timm: str) -> Any:
    """Returns what a config.json of transformers, or of timm's hub, says; None for nothing."""
    arguments = said.get("model_args")
    return said.get(transformers, arguments.get(timm) if isinstance(arguments, dict) else None)


def of_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the shapes of our parameters, or of others', show: field of config.model → value."""
    encoder = params["encoder"]
    blocks = [name for name in encoder if name.startswith("block_")]
    found: dict[str, Any] = {"width": np.shape(encoder["patch_embed"]["kernel"])[-1], "depth": len(blocks)}
    first = encoder[min(blocks)] if blocks else {}
    if "mlp" in first:  # a mixture has experts in some blocks
        width, hidden = np.shape(first["mlp"]["fc1"]["kernel"])
        found["mlp_ratio"] = hidden // width if hidden % width == 0 else hidden / width
    if blocks:
        found["layer_scale"] = LAYER_SCALE if "ls1" in first else 0.0
    if "pos_embed" in encoder:
        found["positions"] = "learned"
    return found


def check_same(source: str, loaded: Mapping[str, Any], config: ConfigDict) -> None:
    """Raises UserError, with both, where the shapes of loaded parameters are other ones than the config's."""
    if "patch_embed" not in loaded.get("encoder", {}):
        raise UserError(f"init_from={source}: {layouts.strange(flatten(loaded))}")
    found = of_params(loaded)
    other = {field: found[field] for field in ("width", "depth", "mlp_ratio")
             if field in found and found[field] != config.model[field]}
    if other:
        theirs = ", ".join(f"model.{field}={value}" for field, value in other.items())
        raise UserError(f"init_from={source} holds another encoder: {theirs}, where this config has "
                        f"{', '.join(str(config.model[field]) for field in other)}. A recipe for fine-tuning that is "
                        "given no size takes that of the file (model.auto)")
