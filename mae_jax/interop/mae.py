"""The state dict of the published MAE code, whose encoder half is timm's ViT, to and from our parameter tree.

PyTorch keeps a linear layer's weight as [out, in] and a convolution's as [out, channel, row, column]; ours are
[in, out], the patch embedding being a linear layer over (row, column, channel), channel fastest. The fused query, key
and value rows have the same order in both. Positions are not parameters here: they are checked on the way in and made
anew on the way out.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mae_jax.errors import UserError
from mae_jax.models.layers import sincos_positions
from mae_jax.params import flatten

POSITIONS = {"encoder": "pos_embed", "decoder": "decoder_pos_embed"}
OUT = (  # our path to their key; the first that matches
    (r"encoder/patch_embed/", "patch_embed.proj."),
    (r"encoder/block_0*(\d+)/", r"blocks.\1."),
    (r"encoder/(norm/|cls_token$)", r"\1"),
    (r"decoder/block_0*(\d+)/", r"decoder_blocks.\1."),
    (r"decoder/(embed|norm)/", r"decoder_\1."),
    (r"decoder/head/", "decoder_pred."),
    (r"decoder/(mask_token)$", r"\1"),
)
IN = (  # and back; blocks and leaves are finished by _path
    (r"patch_embed\.proj\.", "encoder/patch_embed/"),
    (r"decoder_blocks\.", "decoder/block_"),
    (r"blocks\.", "encoder/block_"),
    (r"decoder_pred\.", "decoder/head/"),
    (r"decoder_(embed|norm)\.", r"decoder/\1/"),
    (r"norm\.", "encoder/norm/"),
    (r"mask_token$", "decoder/mask_token"),
    (r"cls_token$", "encoder/cls_token"),
)
LEAF = r"(patch_embed|embed|norm|head|block_\d\d+/(norm[12]|attn/(qkv|proj)|mlp/fc[12]))/(kernel|scale|bias)"
KNOWN = re.compile(rf"(encoder|decoder)/{LEAF}|encoder/cls_token|decoder/mask_token")


def to_mae(params: Any, grid: tuple[int, int], patch: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns the published code's state dict, float32, with positions; values are moved, never computed.

    Args:
      params: {'encoder': ..., 'decoder': ...} of a masked autoencoder; an encoder alone will do.
      grid: number of patches along (height, width), for the positions.
      patch: pixels along (height, width).

    Raises:
      UserError: the layout cannot hold a parameter (mask tokens in the encoder, experts).
    """
    state = {_key(path): _transposed(path, np.asarray(leaf), patch) for path, leaf in flatten(params).items()}
    for part, key in POSITIONS.items():
        if part in params:
            width = np.shape(params[part]["norm"]["scale"])[0]
            state[key] = np.pad(sincos_positions(grid, width), ((1, 0), (0, 0)))[None]  # the class token's is zero
    return state


def from_mae(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our parameters {'encoder': ...[, 'decoder': ...]}, float32, of a state dict of the published code.

    Args:
      state: key → array (NumPy, or anything that np.asarray takes); an encoder alone will do.

    Raises:
      UserError: an unknown key, or positions that are not the fixed sine-cosine ones.
    """
    params: dict[str, Any] = {}
    for key, value in state.items():
        array = np.asarray(value, np.float32)
        if key in POSITIONS.values():
            _check_positions(key, array[0])
            continue
        path = _path(key)
        node = params
        *parents, name = path.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = _untransposed(path, array)
    return params


def encoder_only(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the part of a `to_mae` dict that timm's ViT models have (created with num_classes=0)."""
    return {key: value for key, value in state.items() if not key.startswith("decoder_") and key != "mask_token"}


def _key(path: str) -> str:
    for pattern, name in OUT:
        if re.match(pattern, path):
            key = re.sub(pattern, name, path, count=1).replace("/", ".")
            return re.sub(r"(kernel|scale)$", "weight", key)
    raise UserError(f"the parameter {path} has no place in the published MAE layout")


def _path(key: str) -> str:
    for pattern, name in IN:
        if re.match(pattern, key):
            path = re.sub(pattern, name, key, count=1).replace(".", "/")
            path = re.sub(r"block_(\d+)", lambda match: f"block_{int(match[1]):02d}", path)
            path = re.sub("weight$", "scale" if re.search(r"norm\d?/", path) else "kernel", path)
            if KNOWN.fullmatch(path):
                return path
    raise UserError(f"{key} is no parameter of a masked autoencoder; expected keys such as cls_token, "
                    "blocks.0.attn.qkv.weight, decoder_pred.bias")


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


def _check_positions(key: str, table: np.ndarray) -> None:
    """Raises UserError unless the table [1 + N, D] is zero and then sine-cosine, for some grid of N patches."""
    patches, width = table.shape[0] - 1, table.shape[1]
    grids = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    if table[0].any() or not any(np.allclose(table[1:], sincos_positions(grid, width), atol=1e-5) for grid in grids):
        raise UserError(f"{key} does not hold the fixed sine-cosine positions; learned positions cannot be read")
