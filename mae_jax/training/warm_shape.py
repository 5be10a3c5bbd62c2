"""The shape of the encoder in `init_from`: fills the config fields that a recipe leaves open, and compares shapes.

A recipe lists the open fields in `model.auto`. They are filled before the run begins: config.json has their values, and
a resumed run uses these.
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

HEADS = {width: heads for width, _, heads in SIZES.values()}  # width → heads of published ViTs; shapes do not reveal it
GELUS = {"gelu": "erf", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_tanh": "tanh"}  # their name → our name
LAYER_SCALE = 1e-4  # initial value of a model with LayerScale (DeiT III), which loading replaces


def with_shape(config: ConfigDict) -> ConfigDict:
    """Returns the config with its open fields set to the encoder shape of `init_from`, and logs them.

    Without `init_from`, the open fields keep the values of the recipe.

    Raises:
      UserError: `init_from` does not exist, or its number of heads or patch size is not known.
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
        logger.info("init_from %s: its weights set model.%s%s", config.init_from, said,
                    "".join(f"; {note}" for note in notes))
    return config.lock()


def shape_of(source: str, heads: bool = True) -> tuple[dict[str, Any], list[str]]:
    """Returns field of config.model → value for the encoder in a source, and notes on the origin of the values.

    Args:
      source: a value of config.init_from.
      heads: whether the number of heads is required.

    Raises:
      UserError: the source does not exist or has no encoder, or its number of heads or patch size is not known.
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
        raise UserError(f"init_from={source} does not state the number of attention heads, and no published ViT has "
                        f"its width {found['width']}; set --config.model.heads")
    return found, notes


def of_weights(source: str, params: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns field of config.model → value for weights without our config, and notes on the origin of the values.

    `heads` and `gelu` are missing if they are not known.

    Args:
      source: the file or folder of the weights; a config.json beside them is read.
      params: the parameters, with our names.

    Raises:
      UserError: the patch size is not known, or the MLP width is not a multiple of the token width.
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
        raise UserError(f"{source}: its patches have {rows} values, which is no square patch in RGB, and their size is "
                        "not stated; set --config.model.patch")
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
    """Returns a field of a config.json of transformers, or of timm's hub; None without it.

    Args:
      said: the content of config.json.
      transformers, timm: the names of the field in the two formats.
    """
    arguments = said.get("model_args")
    return said.get(transformers, arguments.get(timm) if isinstance(arguments, dict) else None)


def of_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns field of config.model → value, from the shapes of parameters with our names."""
    encoder = params["encoder"]
    blocks = [name for name in encoder if name.startswith("block_")]
    found: dict[str, Any] = {"width": np.shape(encoder["patch_embed"]["kernel"])[-1], "depth": len(blocks)}
    first = encoder[min(blocks)] if blocks else {}
    if "mlp" in first:  # blocks with experts have no MLP
        width, hidden = np.shape(first["mlp"]["fc1"]["kernel"])
        found["mlp_ratio"] = hidden // width if hidden % width == 0 else hidden / width
    if blocks:
        found["layer_scale"] = LAYER_SCALE if "ls1" in first else 0.0
    if "pos_embed" in encoder:
        found["positions"] = "learned"
    return found


def check_same(source: str, loaded: Mapping[str, Any], config: ConfigDict) -> None:
    """Raises UserError if width, depth or MLP ratio of the loaded encoder differ from the config."""
    if "patch_embed" not in loaded.get("encoder", {}):
        raise UserError(f"init_from={source}: {layouts.strange(flatten(loaded))}")
    found = of_params(loaded)
    other = {field: found[field] for field in ("width", "depth", "mlp_ratio")
             if field in found and found[field] != config.model[field]}
    if other:
        theirs = ", ".join(f"model.{field}={value}" for field, value in other.items())
        raise UserError(f"init_from={source} has another encoder: {theirs}, where this config has "
                        f"{', '.join(str(config.model[field]) for field in other)}. A recipe for fine-tuning without "
                        "a size uses that of the file (model.auto)")
