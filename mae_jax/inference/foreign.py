"""Configs for encoders of other libraries, from the shapes of their arrays and the files beside them.

Values that neither has are set to the usual ones and logged: image size 224 where there are no positions to count, the
number of heads of published ViTs with this width, ImageNet's mean and standard deviation.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax import param_tree
from mae_jax.config import default, validate
from mae_jax.errors import UserError
from mae_jax.ops import pos_embed
from mae_jax.ops.patches import MEAN, STD
from mae_jax.runtime import bounded_json
from mae_jax.storage import weight_files
from mae_jax.storage.file_kinds import unreadable
from mae_jax.storage.paths import locate, read_bytes
from mae_jax.training import warm_shape, workdir

logger = logging.getLogger(__name__)
USUAL_SIZE = 224  # pixels; image size of most published encoders
POSITIONS = ("pos_embed", "position_embeddings")  # the encoder's, by timm and the MAE code, and by transformers
Params = dict[str, Any]


def config_of(source: str, params: Params, image_size: tuple[int, int] | None, heads: int,
              loaded: Mapping[str, Any] | None = None) -> ConfigDict:
    """Returns a config for an encoder, and for its classifier if there is one.

    Args:
      source: the file or folder of the parameters.
      params: parameters under mae_jax's names.
      image_size: height and width in pixels; None: as in the files.
      heads: number of attention heads; 0: as in the files, or as usual for the width.
      loaded: the arrays under the names of the files, whose position embeddings tell the image size if nothing else
        does; `params` lack them where they are sines and cosines.

    Raises:
      UserError: the parameters are not those of a supported ViT, or the number of heads is unknown.
    """
    flat, said = param_tree.flatten(params.get("encoder", {})), workdir.described(source)
    for name in ("cls_token", "patch_embed/kernel", "block_00/mlp/fc1/kernel"):
        if name not in flat:
            raise UserError(f"{source} holds no ViT encoder: {name} is missing")
    found, notes = warm_shape.of_weights(source, params)
    if heads:
        found["heads"], notes = heads, []
    if "heads" not in found:
        raise UserError(f"{source} does not record its number of attention heads, and no published ViT has the width "
                        f"{found['width']}; give heads=")
    for note in notes:
        logger.info("%s: %s", source, note)
    classifier = "head" in params and "decoder" not in params
    config = default("supervised" if classifier else "mae")
    config.model.update(found, pool="mean" if "fc_norm" in params else "cls")
    config.data.image_size = image_size or _image_size(source, said, found["patch"], _side(loaded or {}))
    config.eval.crop_ratio = (_crop_ratio(said),)
    validate(config, for_training=False)
    return config.lock()


def fitted(source: str, params: Params, config: ConfigDict) -> Params:
    """Adapts parameters to the config's image size and to ImageNet's normalization of pixels.

    Learned position embeddings are resized to another grid (`pos_embed.resize`). If the files have another mean and
    standard deviation, the patch embedding is changed so that its outputs stay the same.

    Raises:
      UserError: the position embeddings must be resized, but are not those of a square grid.
    """
    encoder = dict(params["encoder"])
    rows, columns = (size // side for size, side in zip(config.data.image_size, config.model.patch, strict=True))
    if "pos_embed" in encoder and len(table := np.asarray(encoder["pos_embed"])) != rows * columns:
        side = math.isqrt(len(table))
        if side * side != len(table):
            raise UserError(f"{source}: {len(table)} positions are not a square grid")
        encoder["pos_embed"] = pos_embed.resize(table, (side, side), (rows, columns))
        logger.info("%s: positions of %d x %d patches are resized to %d x %d", source, side, side, rows, columns)
    mean, deviation = _normalization(source)
    if (mean, deviation) != (MEAN, STD):
        encoder["patch_embed"] = _renormalized(encoder["patch_embed"], mean, deviation)
        logger.info("%s: pixels are normalized by mean %s and deviation %s, as in its files", source, mean, deviation)
    return {**params, "encoder": encoder}


def _side(loaded: Mapping[str, Any]) -> int:
    """Returns the rows of the square grid of patches that position embeddings, [1, N, D] or [1, 1 + N, D], are of.

    0 if there are none, or their grid is not a square.
    """
    for name, array in param_tree.flatten(loaded).items():
        parts = re.split(r"[./]", name)
        if parts[-1] in POSITIONS and "decoder" not in parts and np.ndim(array) > 1:
            count = np.shape(array)[-2]
            return next((side for rows in (count, count - 1) if (side := math.isqrt(rows)) ** 2 == rows), 0)
    return 0


def _image_size(source: str, said: Mapping[str, Any], patch: tuple[int, int], side: int) -> tuple[int, int]:
    found = said.get("image_size") or _sides(_of_timm(said, "input_size", []))
    sides = [found, found] if isinstance(found, int) else found
    if isinstance(sides, list) and len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides):
        return sides[0], sides[1]
    if side:
        size = side * patch[0], side * patch[1]
        if size != (USUAL_SIZE, USUAL_SIZE):
            logger.info("%s does not record its image size; using %d x %d, by its positions of %d x %d patches",
                        source, *size, side, side)
        return size
    if any(USUAL_SIZE % side for side in patch):
        raise UserError(f"{source} does not record its image size, and {USUAL_SIZE} is not a multiple of its patches "
                        f"of {patch[0]}x{patch[1]} pixels; give image_size=")
    logger.info("%s does not record its image size; using %d", source, USUAL_SIZE)
    return USUAL_SIZE, USUAL_SIZE


def _sides(input_size: Any) -> Any:
    """Returns [height, width] of timm's [channels, height, width]; [] for anything else."""
    return input_size[1:] if isinstance(input_size, list) else []


def _crop_ratio(said: Mapping[str, Any]) -> float:
    found = _of_timm(said, "crop_pct", 0)
    return float(found) if isinstance(found, int | float) and 0 < found <= 1 else USUAL_SIZE / 256


def _of_timm(said: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    inside = said.get("pretrained_cfg")
    return inside.get(name, otherwise) if isinstance(inside, dict) else otherwise


def _normalization(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of RGB in [0, 1] from the files; ImageNet's if they have none."""
    said = workdir.described(source)
    beside = _preprocessor(source)
    found = [(beside.get("image_mean"), beside.get("image_std")),
             (_of_timm(said, "mean", None), _of_timm(said, "std", None))]
    for mean, deviation in found:
        pair = (mean, deviation)
        if all(isinstance(each, list) and len(each) == 3 and all(isinstance(x, int | float) for x in each)
               for each in pair) and min(deviation) > 0:
            return tuple(map(float, mean)), tuple(map(float, deviation))
    logger.info("%s does not record its normalization of pixels; using ImageNet's mean and deviation", source)
    return MEAN, STD


def _preprocessor(source: str) -> dict[str, Any]:
    """Returns the content of transformers' preprocessor_config.json beside the weights; {} without one."""
    path = locate(source)
    file = weight_files.file_of(path)
    beside = path / "preprocessor_config.json"
    content = read_bytes(beside) if file is not None and file != path else None
    try:
        return bounded_json.parse_object(content) if content else {}
    except ValueError as error:
        raise UserError(unreadable(beside, content or b"", error)) from None


def _renormalized(embed: Mapping[str, Any], mean: tuple[float, ...], deviation: tuple[float, ...]) -> dict[str, Any]:
    """Converts a patch embedding for pixels with another normalization to one for ImageNet's normalization.

    If x are pixels with ImageNet's normalization, those with the other one are s · x + t, where s = STD / deviation and
    t = (MEAN - mean) / deviation. The kernel is [P, D], channel fastest.
    """
    kernel = np.asarray(embed["kernel"], np.float64)
    repeats = len(kernel) // 3
    scale = np.tile(np.array(STD) / deviation, repeats)
    shift = np.tile((np.array(MEAN) - mean) / deviation, repeats)
    bias = np.asarray(embed["bias"], np.float64) + shift @ kernel
    return {**embed, "kernel": (scale[:, None] * kernel).astype(np.float32), "bias": bias.astype(np.float32)}
