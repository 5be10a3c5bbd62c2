"""Conversion between mae_jax's parameters and state dicts of MAE's released code, whose encoder is timm's ViT.

PyTorch stores a linear layer's weight as [out, in] and a convolution's as [out, channel, row, column]. mae_jax stores
[in, out], and its patch embedding is a linear layer over (row, column, channel), channel fastest. The rows of the fused
query, key and value projection have the same order in both.

Fixed position embeddings are not parameters in mae_jax: they are recognized when reading and computed when writing. The
class token has no position embedding in mae_jax: its row is written as zeros, and is added to the token when reading.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.errors import UserError, printable
from mae_jax.interop.layouts import Layout, mixture, nearest
from mae_jax.models.layers import sincos_positions
from mae_jax.ops.patches import PatchGrid
from mae_jax.param_tree import flatten, nest

POSITIONS = {"encoder": "pos_embed", "decoder": "decoder_pos_embed"}
OUT = (  # pattern of a path of mae_jax → key of a state dict; the first match applies
    (r"encoder/patch_embed/", "patch_embed.proj."),
    (r"encoder/block_0*(\d+)/(?!ls)", r"blocks.\1."),
    (r"encoder/(norm/|cls_token$)", r"\1"),
    (r"(fc_norm|head)/", r"\1."),
    (r"decoder/block_0*(\d+)/", r"decoder_blocks.\1."),
    (r"decoder/(embed|norm)/", r"decoder_\1."),
    (r"decoder/head/", "decoder_pred."),
    (r"decoder/(mask_token)$", r"\1"),
)
IN = (  # pattern of a key → path; `_path` converts block numbers and leaves
    (r"patch_embed\.proj\.", "encoder/patch_embed/"),
    (r"decoder_blocks\.", "decoder/block_"),
    (r"blocks\.", "encoder/block_"),
    (r"decoder_pred\.", "decoder/head/"),
    (r"decoder_(embed|norm)\.", r"decoder/\1/"),
    (r"norm\.", "encoder/norm/"),
    (r"(fc_norm|head)\.", r"\1/"),
    (r"mask_token$", "decoder/mask_token"),
    (r"encoder\.mask_token$", "encoder/mask_token"),
    (r"cls_token$", "encoder/cls_token"),
)
LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
WHOLE = ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed", *(f"{layer}.{leaf}" for leaf in ("weight", "bias")
         for layer in ("patch_embed.proj", "norm", "fc_norm", "head", "decoder_embed", "decoder_norm", "decoder_pred")))
BLOCK_LEAF = r"(norm[12]|attn/(qkv|proj)|mlp/fc[12])/(kernel|scale|bias)|ls[12]/gamma"
LEAF = rf"(patch_embed|embed|norm|head)/(kernel|scale|bias)|block_\d\d+/({BLOCK_LEAF})"
OWN_LEAF = r"encoder/(cls|mask)_token|decoder/mask_token|(fc_norm|head)/(kernel|scale|bias)"
KNOWN = re.compile(rf"(encoder|decoder)/({LEAF})|{OWN_LEAF}")


def to_mae(params: Any, grid: tuple[int, int], patch: tuple[int, int]) -> dict[str, np.ndarray]:
    """Converts parameters to a float32 state dict of MAE's released code, with position embeddings.

    Args:
      params: {'encoder': ..., 'decoder': ...} of a masked autoencoder, an encoder only, or an encoder with 'head' and,
        for average pooling, 'fc_norm' (the released fine-tuning code).
      grid: patches along (height, width), for the position embeddings.
      patch: pixels of a patch along (height, width).

    Raises:
      UserError: the layout does not have a parameter (mask tokens in the encoder, LayerScale, experts).
    """
    flat = flatten(params)
    learned = flat.pop("encoder/pos_embed", None)
    state = {_key(path): _transposed(path, np.asarray(leaf), patch) for path, leaf in flat.items()}
    for part, key in POSITIONS.items():
        if part in params:
            width = np.shape(flat[f"{part}/block_00/norm1/scale"])[0]
            table = sincos_positions(grid, width) if part == "decoder" or learned is None else np.asarray(learned)
            state[key] = np.pad(table, ((1, 0), (0, 0)))[None]  # zeros for the class token
    return state


def from_mae(state: Mapping[str, Any], grid: tuple[int, int] | None = None) -> dict[str, Any]:
    """Converts a state dict to parameters {'encoder': ...[, 'decoder': ..., 'fc_norm': ..., 'head': ...]}, float32.

    Args:
      state: key → array (anything that np.asarray takes) of MAE's released code, or of timm's ViT or DeiT III; the
        encoder's keys suffice.
      grid: patches along (height, width), if known, to detect a row for the class token in the position embeddings.
        Otherwise there is one unless the number of rows is a square.

    Raises:
      UserError: a key is unknown, the class token is missing, or the decoder's position embeddings are not the fixed
        sine-cosine ones.
    """
    close = {part: _tolerance(state[key]) for part, key in POSITIONS.items() if key in state}
    arrays = _of_beit({key: np.asarray(value, np.float32) for key, value in state.items()})
    tables = {part: arrays.pop(key)[0] for part, key in POSITIONS.items() if key in arrays}
    flat = {path: _untransposed(path, array) for path, array in ((_path(key), arrays[key]) for key in arrays)}
    if "decoder" in tables and (tables["decoder"][0].any() or not _fixed(tables["decoder"][1:], close["decoder"])):
        raise UserError(f"{POSITIONS['decoder']} does not hold the fixed sine-cosine positions; learned positions of a "
                        "decoder cannot be read")
    placed = _positions(flat, tables["encoder"], grid, close["encoder"]) if "encoder" in tables else {}
    return nest(flat | placed)


def _of_beit(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts BEiT's keys: separate biases of query and value, and the mask token of an encoder.

    Raises:
      UserError: the encoder has relative positions, which this layout does not support, or a bias is missing.
    """
    if strange := next((key for key in arrays if "relative_position" in key), ""):
        raise UserError(f"{strange}: an encoder with relative positions, as BEiT's published ones, is another model")
    for key in [key for key in arrays if key.endswith(".attn.q_bias")]:
        stem = key.removesuffix("q_bias")
        query, value = arrays.pop(key), arrays.pop(f"{stem}v_bias", None)
        if value is None:
            raise UserError(f"{key} is there, but {stem}v_bias is missing")
        arrays[f"{stem}qkv.bias"] = np.concatenate([query, np.zeros_like(query), value])
    if "mask_token" in arrays and not any(key.startswith("decoder_") for key in arrays):
        arrays["encoder.mask_token"] = arrays.pop("mask_token")
    return arrays


def _key(path: str) -> str:
    for pattern, name in OUT:
        if re.match(pattern, path):
            key = re.sub(pattern, name, path, count=1).replace("/", ".")
            return re.sub(r"(kernel|scale)$", "weight", key)
    raise UserError(f"MAE's released layout does not have the parameter {path}; use --layout=timm")


def _path(key: str) -> str:
    key = re.sub(r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma", key)  # DeiT III's own names
    for pattern, name in IN:
        if re.match(pattern, key):
            path = re.sub(pattern, name, key, count=1).replace(".", "/")
            path = re.sub(r"block_(\d+)", lambda match: f"block_{int(match[1]):02d}", path)
            path = re.sub("weight$", "scale" if re.search(r"norm\d?/", path) else "kernel", path)
            if KNOWN.fullmatch(path):
                return path
    raise UserError(f"{printable(key)} is not a parameter of a masked autoencoder or a ViT classifier; "
                    f"{nearest(key, expected(key))}")


def expected(key: str) -> list[str]:
    """Returns all valid keys, for suggestions; those of blocks have the block number of `key`."""
    number = match[1] if (match := re.search(r"\.(\d+)\.", key)) else "0"
    leaves = [f"{layer}.{leaf}" for layer in LAYERS for leaf in ("weight", "bias")]
    return [*WHOLE, *(f"{start}.{number}.{leaf}" for start in ("blocks", "decoder_blocks") for leaf in leaves),
            *(f"blocks.{number}.ls{i}.gamma" for i in (1, 2))]


def _transposed(path: str, array: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
    if not path.endswith("kernel"):
        return array
    if "patch_embed" in path:
        return np.ascontiguousarray(array.reshape(*patch, -1, array.shape[-1]).transpose(3, 2, 0, 1))
    return np.ascontiguousarray(array.T)


def _untransposed(path: str, array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0]))
    return np.ascontiguousarray(array.T) if path.endswith("kernel") else array


def _positions(flat: Mapping[str, np.ndarray], table: np.ndarray, grid: tuple[int, int] | None,
               close: float) -> dict[str, Any]:
    """Returns the parameters that position embeddings [N, D] or [1 + N, D] set: the table if learned, the class token.
    """
    if "encoder/cls_token" not in flat:
        raise UserError("cls_token is missing: encoders without a class token cannot be read")
    changed = {}
    if _begins_with_class(len(table), grid):
        changed["encoder/cls_token"] = flat["encoder/cls_token"] + table[0]
        table = table[1:]
    return changed if _fixed(table, close) else changed | {"encoder/pos_embed": table}


def _begins_with_class(rows: int, grid: tuple[int, int] | None) -> bool:
    if grid and rows - math.prod(grid) in (0, 1):
        return rows > math.prod(grid)
    return math.isqrt(rows) ** 2 != rows


def _tolerance(table: Any) -> float:
    """Returns the largest rounding error of a sine or cosine in the table's dtype."""
    return {"float16": 1e-3, "bfloat16": 1e-2}.get(str(getattr(table, "dtype", "")), 1e-5)


def _fixed(table: np.ndarray, close: float) -> bool:
    """Returns whether a table [N, D] equals the sine-cosine positions of some grid of N patches, to a tolerance."""
    patches, width = table.shape
    grids = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    return any(np.allclose(table, sincos_positions(grid, width), atol=close) for grid in grids)


def _from(state: Mapping[str, Any], config: ConfigDict | None) -> dict[str, Any]:
    return from_mae(state, PatchGrid.of(config).shape if config else None)


LAYOUT = Layout(
    to=lambda params, config: to_mae(params, PatchGrid.of(config).shape, config.model.patch),
    from_=_from,
    recognizes=lambda names: any(name.startswith("blocks.") for name in names),
    refuses=mixture,
    whole=lambda config: config.method.name in ("mae", "supervised"),
    files=(".safetensors", ".pth"),
    loading=lambda exported: """import safetensors.torch

state = safetensors.torch.load_file("FOLDER/model.safetensors")
model.load_state_dict(state, strict=False)  # models_mae.py's, or models_vit.py's, of the published code""",
)
