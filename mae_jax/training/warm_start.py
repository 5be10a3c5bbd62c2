"""Warm starts: `init_from` is a workdir, the folder of a step in it, or weights of another library.

The weights of other libraries are a file of safetensors or torch.save, or a folder as written by transformers and timm,
in any readable layout of `mae_jax.interop.layouts`.
"""

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax import methods, param_tree
from mae_jax.errors import UserError
from mae_jax.interop import layouts
from mae_jax.interop.timm import folded
from mae_jax.models.layers import sincos_positions
from mae_jax.models.upcycling import upcycle
from mae_jax.ops import pos_embed, windows
from mae_jax.ops.patches import PatchGrid
from mae_jax.storage import paths
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import warm_shape, workdir

logger = logging.getLogger(__name__)

# Fields that the shapes of parameters do not reveal, but that change the function of the encoder.
MUST_MATCH = ("model.heads", "model.gelu", "model.patch")
DENSE = ("detection", "segmentation")  # tasks for which the patch embedding is resized to another patch size
# Parameters that either encoder may lack: the final norm, for example, is replaced by the norm of the pooled mean.
OPTIONAL = re.compile(r"encoder/(pos_embed|mask_token|norm/(scale|bias)|block_\d+/experts/gate/kernel)")
# Parameters that may be added: relative positions of 0, and LayerScales of 1, do not change the encoder's function.
ADDED = re.compile(r"encoder/block_\d+/attn/(rel_pos_[hw]|relative_position_bias)")
SCALES = re.compile(r"encoder/block_\d+/ls[12]/gamma")


def load(config: ConfigDict, params: Any, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the parameters of config.init_from, adapted to a model; `param_tree.merge` inserts them.

    Args:
      config: the config of the run.
      params: the model's parameters, or their shapes.
      classes: names of the classes of the data.

    Raises:
      UserError: init_from does not exist, or has another encoder.
    """
    paths.for_orbax(config.init_from, "init_from")  # checked only here, since a resumed run does not read init_from
    theirs = workdir.config_of(config.init_from)
    loaded = _read(config, theirs)
    warm_shape.check_same(config.init_from, loaded, config)
    dense = methods.get(config.method.name).task in DENSE
    if dense:
        loaded, theirs = _with_patches(loaded, theirs, config)
    if theirs is not None:
        _check_same_function(theirs, config)
    else:
        _check_described(config, MUST_MATCH[:2] if dense else MUST_MATCH)
    loaded = _without_other_head(_with_positions(loaded, theirs, config, params), theirs, config, params, classes)
    loaded = _with_relative_positions(_without_other_classes(loaded, config, params, classes), params)
    loaded = upcycle(loaded, params)
    there, here = param_tree.flatten(loaded).keys(), param_tree.flatten(params).keys()
    allowed = {name for name in there ^ here if OPTIONAL.fullmatch(name)}
    allowed |= {name for name in here - there if ADDED.fullmatch(name)}
    allowed |= {name for name in here - there if SCALES.fullmatch(name) and config.model.layer_scale == 1}
    if "encoder/cls_token" not in here and not config.method.get("class_token", True):
        allowed.add("encoder/cls_token")  # for detectors without a class token
    strange = [name for name in sorted((there ^ here) - allowed) if name.startswith("encoder/")]
    if strange:
        hint = "; mae_jax export --for-task=vote extracts one encoder from a mixture of experts"
        raise UserError(f"init_from={config.init_from} has another encoder: {strange[0]} and {len(strange) - 1} more "
                        f"parameters are in only one of the two{hint if '/experts/' in ' '.join(strange) else ''}")
    param_tree.common(params, loaded)
    return loaded


def _read(config: ConfigDict, theirs: ConfigDict | None) -> dict[str, Any]:
    """Reads parameters in our layout or in another one; returns them with our names."""
    loaded, extras = param_tree.split_eval_params(load_params(config.init_from, ema=True, extras=True))
    if config.method.get("head") == "linear":  # a probe's head needs its batch norm
        loaded = folded(loaded, extras)
    return param_tree.split_eval_params(layouts.read(loaded, theirs))[0]  # without the moments of batch norms


def _check_same_function(theirs: ConfigDict, ours: ConfigDict) -> None:
    for key in MUST_MATCH:
        group, name = key.split(".")
        if theirs[group][name] != ours[group][name]:
            raise UserError(f"init_from={ours.init_from} was trained with {key}={theirs[group][name]}, but this config "
                            f"has {ours[group][name]}")
    scale = theirs.model.layer_scale
    if bool(scale) != bool(ours.model.layer_scale) and not (scale == 0 and ours.model.layer_scale == 1):
        raise UserError(f"init_from={ours.init_from} was trained with{'' if scale else 'out'} LayerScale; add "
                        f"--config.model.layer_scale={scale:g}")


def _check_described(config: ConfigDict, fields: Sequence[str]) -> None:
    """Raises UserError if transformers' config.json beside the weights differs from the config in one of the fields."""
    said = workdir.described(config.init_from)
    heads, activation, patch = (said.get(key) for key in ("num_attention_heads", "hidden_act", "patch_size"))
    ours = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}[config.model.gelu]
    for name, there, here in (("model.heads", heads, config.model.heads), ("model.gelu", activation, ours),
                              ("model.patch", patch, config.model.patch[0])):
        if name in fields and isinstance(there, int | str) and there != here:
            raise UserError(f"init_from={config.init_from}: its config.json says {there!r} where this config has "
                            f"{name}={config.model[name.split('.')[1]]}")
    if not said:
        logger.info("init_from %s does not state the number of attention heads; assumed are the %d of model.heads",
                    config.init_from, config.model.heads)


def _without_other_head(loaded: dict[str, Any], theirs: ConfigDict | None, config: ConfigDict, params: Any,
                        classes: Sequence[str]) -> dict[str, Any]:
    """Drops a head of other classes or of another method, or any head if the model has a probe's batch norm.

    It is renamed, so that `param_tree.merge` reports it as unused. Raises UserError if init_head=keep excludes that.
    """
    old, new = (param_tree.flatten(tree).get("head/kernel") for tree in (loaded, params))
    fits = (old is not None and new is not None and old.shape == new.shape and config.method.get("head") != "probe"
            and (theirs is None or theirs.method.name == config.method.name))
    if config.init_head == "keep" and new is not None and not fits:
        why = "method.head=probe learns a new one always" if config.method.get("head") == "probe" else \
            f"init_from={config.init_from} has none of method.name={config.method.name} and {new.shape[1]} classes"
        raise UserError(f"init_head=keep asks for the head of init_from: {why}")
    if old is None or new is None:
        return loaded
    if fits and _keeps_head(config, classes):
        return loaded
    return {("another head" if name == "head" else name): value for name, value in loaded.items()}


def _without_other_classes(loaded: dict[str, Any], config: ConfigDict, params: Any,
                           classes: Sequence[str]) -> dict[str, Any]:
    """Drops a detector's parameters per class if its classes are others; renamed, so that `merge` reports them."""
    pattern = methods.get(config.method.name).class_parameters(config)
    there, here = (param_tree.flatten(tree) for tree in (loaded, params))
    own = [name for name in there.keys() & here.keys() if pattern and re.fullmatch(pattern, name)]
    if not own or config.init_head == "keep":
        return loaded
    if all(there[name].shape == here[name].shape for name in own) and _keeps_head(config, classes):
        return loaded
    return param_tree.nest({(f"other classes/{name}" if name in own else name): leaf for name, leaf in there.items()})


def _keeps_head(config: ConfigDict, classes: Sequence[str]) -> bool:
    """Returns whether a head of equal shape is kept, by config.init_head and the class names; logs the reason."""
    if config.init_head == "new":
        return False
    if not methods.get(config.method.name).has_class_head:
        return True
    before = workdir.classes_of(config.init_from)
    other = workdir.other_classes(before, classes) if before and classes else ""
    if other:
        kept = config.init_head == "keep"
        logger.warning("init_from %s: its head has other classes; %s. %s", config.init_from, other,
                       "It is used, because of init_head=keep" if kept else
                       "A new head is made; --config.init_head=keep uses it")
        return kept
    if not before or not classes or all(name.isdecimal() for name in classes):
        logger.info("init_from %s: its head is used: it has as many classes, whose names are unknown; "
                    "--config.init_head=new makes a new one", config.init_from)
    return True


def _with_positions(loaded: dict[str, Any], theirs: ConfigDict | None, config: ConfigDict, params: Any) -> Any:
    """Adapts the position embedding: resizes a learned one; initializes a learned one from fixed positions.

    Raises:
      UserError: the loaded positions are learned, but those of the config are not.
    """
    encoder = loaded.get("encoder", {})
    learned, wanted = "pos_embed" in encoder, "pos_embed" in params["encoder"]
    if learned and not wanted:
        raise UserError(f"init_from={config.init_from} has learned positions; use model.positions=learned")
    if not wanted:
        return loaded
    here = PatchGrid.of(config).shape
    there = _grid_of(encoder["pos_embed"], theirs) if learned else (PatchGrid.of(theirs).shape if theirs else here)
    table = np.asarray(encoder["pos_embed"]) if learned else sincos_positions(there, config.model.width)
    table = table if there == here else pos_embed.resize(table, there, here)
    return {**loaded, "encoder": {**encoder, "pos_embed": table}}


def _with_patches(loaded: dict[str, Any], theirs: ConfigDict | None, config: ConfigDict) -> tuple[Any, Any]:
    """Resizes the patch embedding to the config's patch size.

    Returns the parameters, and their config with the new patch size and an image size of the same number of patches.
    The kernel is resized by torch's bicubic interpolation, as ViTDet does for MAE's ViT-H/14 (an author's answer:
    facebookresearch/long_seq_mae, issue 2). Sums over a larger patch are larger; fine-tuning must adapt to that.
    """
    kernel = np.asarray(loaded["encoder"]["patch_embed"]["kernel"])
    there, here = theirs.model.patch if theirs else (math.isqrt(len(kernel) // 3),) * 2, tuple(config.model.patch)
    if there == here or math.prod(there) * 3 != len(kernel):
        return loaded, theirs
    rows, columns = (pos_embed.cubic(size, to) for size, to in zip(there, here, strict=True))
    resized = np.einsum("yr,xc,rckd->yxkd", rows, columns, kernel.reshape(*there, 3, -1).astype(np.float64))
    patches = {**loaded["encoder"]["patch_embed"], "kernel": resized.reshape(-1, kernel.shape[1]).astype(np.float32)}
    logger.info("init_from: patches are resized, from %d x %d to %d x %d pixels", *there, *here)
    if theirs:
        grid, theirs = PatchGrid.of(theirs), theirs.copy_and_resolve_references().unlock()
        theirs.model.patch = here
        theirs.data.image_size = (grid.rows * here[0], grid.columns * here[1])
    return {**loaded, "encoder": {**loaded["encoder"], "patch_embed": patches}}, theirs


def _with_relative_positions(loaded: dict[str, Any], params: Any) -> dict[str, Any]:
    """Resizes decomposed relative positions to the model's grid and windows, as in Detectron2."""
    here, there = param_tree.flatten(params), param_tree.flatten(loaded)
    other = [name for name in there.keys() & here.keys() if re.search("/rel_pos_[hw]$", name)
             and here[name].shape[1:] == there[name].shape[1:] and here[name].shape != there[name].shape]
    if not other:
        return loaded
    logger.info("init_from: relative positions are resized, as %s from %d to %d", min(other), len(there[min(other)]),
                len(here[min(other)]))
    return param_tree.nest({name: windows.resized(np.asarray(leaf), len(here[name])) if name in other else leaf
                            for name, leaf in there.items()})


def _grid_of(table: Any, theirs: ConfigDict | None) -> tuple[int, int]:
    """Returns the grid (rows, columns) of learned positions [N, D]: that of the config, or a square one without it.

    Raises:
      UserError: there is no config, and N is not a square number.
    """
    if theirs is not None:
        return PatchGrid.of(theirs).shape
    side = math.isqrt(table.shape[0])
    if side * side != table.shape[0]:
        raise UserError(f"init_from: {table.shape[0]} positions are not a square grid, and no config states the grid")
    return side, side
