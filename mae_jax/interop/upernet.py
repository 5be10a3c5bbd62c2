"""UperNet on a plain ViT as others have it, to our parameters: transformers' UperNetForSemanticSegmentation on BEiT's
backbone, and checkpoints of mmsegmentation's head on the backbones of BEiT's and MAE's segmentation code.

Convolutions are [out, in, row, column] there and [row, column, in, out] here; transposed ones [in, out, row, column]
and [in, row, column, out]. BEiT's keys have no bias: ours is then zero. The class token's position joins the token.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mae_jax.errors import UserError, printable
from mae_jax.interop.layouts import Layout
from mae_jax.models.blocks import BIAS_TABLE
from mae_jax.param_tree import nest

ATTENTION = "attention.attention."
TABLE = f"{ATTENTION}relative_position_bias.relative_position_bias_table"
BLOCK = (  # what follows backbone.encoder.layer.N. there, and encoder/block_NN/ here
    ("layernorm_before.", "norm1/"), ("layernorm_after.", "norm2/"), ("attention.output.dense.", "attn/proj/"),
    ("intermediate.dense.", "mlp/fc1/"), ("output.dense.", "mlp/fc2/"),
)
HEAD = (  # the other beginnings, there and here
    (r"backbone\.fpn1\.0\.", "upernet/rescale_0/double/"),
    (r"backbone\.fpn1\.1\.", "upernet/rescale_0/norm/"),
    (r"backbone\.fpn1\.3\.", "upernet/rescale_0/double_again/"),
    (r"backbone\.fpn2\.0\.", "upernet/rescale_1/double/"),
    (r"decode_head\.psp_modules\.(\d)\.1\.", r"upernet/pool_\1/"),
    (r"decode_head\.bottleneck\.", "upernet/pool/"),
    (r"decode_head\.lateral_convs\.(\d)\.", r"upernet/lateral_\1/"),
    (r"decode_head\.fpn_convs\.(\d)\.", r"upernet/pyramid_\1/"),
    (r"decode_head\.fpn_bottleneck\.", "upernet/fuse/"),
    (r"decode_head\.classifier\.", "upernet/main_classes/classifier/"),
    (r"auxiliary_head\.convs\.0\.", "upernet/aux/"),
    (r"auxiliary_head\.classifier\.", "upernet/aux_classes/classifier/"),
)
MMSEG = (  # names of mmsegmentation's head and of those backbones, in transformers'
    (r"^backbone\.blocks\.(\d+)\.", r"backbone.encoder.layer.\1."),
    (r"^(backbone\.encoder\.layer\.\d+\.)norm1\.", r"\1layernorm_before."),
    (r"^(backbone\.encoder\.layer\.\d+\.)norm2\.", r"\1layernorm_after."),
    (r"^(backbone\.encoder\.layer\.\d+\.)attn\.proj\.", r"\1attention.output.dense."),
    (r"^(backbone\.encoder\.layer\.\d+\.)attn\.relative_position_bias_table$", rf"\1{TABLE}"),
    (r"^(backbone\.encoder\.layer\.\d+\.)mlp\.fc1\.", r"\1intermediate.dense."),
    (r"^(backbone\.encoder\.layer\.\d+\.)mlp\.fc2\.", r"\1output.dense."),
    (r"^(backbone\.encoder\.layer\.\d+\.)gamma_([12])$", r"\1lambda_\2"),
    (r"^backbone\.patch_embed\.proj\.", "backbone.embeddings.patch_embeddings.projection."),
    (r"^backbone\.cls_token$", "backbone.embeddings.cls_token"),
    (r"^backbone\.pos_embed$", "backbone.embeddings.position_embeddings"),
    (r"\.bn\.", ".batch_norm."),
    (r"\.conv_seg\.", ".classifier."),
)
QKV = re.compile(r"(backbone\.encoder\.layer\.\d+\.)attn\.(qkv\.(weight|bias)|([qv])_bias)$")
NO_PARAMETER = ("num_batches_tracked", "relative_position_index")
MOMENTS = {"running_mean": "mean", "running_var": "var"}


def from_mmseg(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what `from_hf` does, of the names of mmsegmentation's head on BEiT's or MAE's backbone."""
    renamed: dict[str, Any] = {}
    for key, value in state.items():
        name = key
        for theirs, ours in MMSEG:
            name = re.sub(theirs, ours, name)
        found = QKV.fullmatch(name)
        if not found:
            renamed[name] = value
        elif found[3]:
            for part, rows in zip(("query", "key", "value"), np.split(np.asarray(value), 3), strict=True):
                renamed[f"{found[1]}{ATTENTION}{part}.{found[3]}"] = rows
        else:
            renamed[f"{found[1]}{ATTENTION}{ {'q': 'query', 'v': 'value'}[found[4]]}.bias"] = value
    return from_hf(renamed)


def read(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our parameters of either's state dict; the moments of the batch norms are left out.

    Raises:
      UserError: an unknown key.
    """
    return from_mmseg(state)[0]


def from_hf(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns our parameters and the moments of the batch norms, float32, of a state dict of transformers.

    Raises:
      UserError: an unknown key.
    """
    params: dict[str, np.ndarray] = {}
    moments: dict[str, np.ndarray] = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, value in state.items():
        array = np.asarray(value, np.float32)
        if key.endswith(NO_PARAMETER):
            continue
        block = re.match(r"backbone\.encoder\.layer\.(\d+)\.(.+)", key)
        if block and block[2].startswith(ATTENTION) and block[2] != TABLE:
            place = f"encoder/block_{int(block[1]):02d}/attn/qkv"
            parts.setdefault(place, {})[block[2].removeprefix(ATTENTION)] = array
            continue
        name = _of_block(int(block[1]), block[2]) if block else _of_head(key)
        if name.rsplit("/", 1)[-1] in MOMENTS:
            moments[name.removeprefix("upernet/").rsplit("/", 1)[0] + "/" + MOMENTS[name.rsplit("/", 1)[1]]] = array
        else:
            leaf = _leaf(name)
            params[leaf] = _ours(leaf, array)
    parts_of = ("query", "key", "value")
    for name, fused in parts.items():
        for each in parts_of:
            for leaf in ("weight", "bias"):
                if f"{each}.{leaf}" not in fused and (each, leaf) != ("key", "bias"):
                    raise UserError(f"an UperNet on BEiT's or MAE's backbone has {ATTENTION}{each}.{leaf} in each "
                                    f"block; {name.rsplit('/', 2)[0]} has none")
        fused.setdefault("key.bias", np.zeros_like(fused["query.bias"]))
        params[f"{name}/kernel"] = np.concatenate([fused[f"{part}.weight"].T for part in parts_of], 1)
        params[f"{name}/bias"] = np.concatenate([fused[f"{part}.bias"] for part in parts_of])
    if "encoder/cls_token" not in params:
        raise UserError("an UperNet on BEiT's or MAE's backbone has backbone.embeddings.cls_token; it is missing")
    if "positions" in params:
        table = params.pop("positions")[0]
        params["encoder/cls_token"] = params["encoder/cls_token"] + table[:1]
        params["encoder/pos_embed"] = table[1:]
    return nest(params), nest(moments)


def _of_block(number: int, rest: str) -> str:
    """Returns the path of a key of a block, its leaf as there."""
    start = f"encoder/block_{number:02d}/"
    if rest == TABLE:
        return f"{start}attn/{BIAS_TABLE}"
    if rest in ("lambda_1", "lambda_2"):
        return f"{start}ls{rest[-1]}/gamma"
    for theirs, ours in BLOCK:
        if rest.startswith(theirs):
            return start + ours + rest.removeprefix(theirs)
    raise UserError(f"{printable(rest)} is no part of a block of BEiT")


def _of_head(key: str) -> str:
    """Returns the path of another key, its leaf as there."""
    if key == "backbone.embeddings.cls_token":
        return "encoder/cls_token"
    if key == "backbone.embeddings.position_embeddings":
        return "positions"
    if key.startswith("backbone.embeddings.patch_embeddings.projection."):
        return "encoder/patch_embed/" + key.rsplit(".", 1)[1]
    for theirs, ours in HEAD:
        if found := re.match(theirs, key):
            rest = key[found.end():].replace("conv.", "").replace("batch_norm.", "norm/")
            return found.expand(ours) + rest
    raise UserError(f"{printable(key)} is no part of an UperNet on BEiT's or MAE's backbone")


def _leaf(name: str) -> str:
    """Returns a path with our name of its leaf."""
    start, _, leaf = name.rpartition("/")
    if leaf == "weight":
        leaf = "scale" if start.endswith(("norm", "norm1", "norm2")) else "kernel"
    return f"{start}/{leaf}" if start else leaf


def _ours(name: str, array: np.ndarray) -> np.ndarray:
    """Returns a parameter with its axes as ours, by our path."""
    if not name.endswith("/kernel"):
        return array
    if "/double" in name:
        return array.transpose(0, 2, 3, 1)
    if name == "encoder/patch_embed/kernel":
        return array.transpose(2, 3, 1, 0).reshape(-1, len(array))
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
        return array[0, 0] if array.shape[:2] == (1, 1) else array
    return array.T


LAYOUT = Layout(
    from_=lambda state, config: read(state),
    recognizes=lambda names: any(name.startswith("decode_head.") for name in names),
    refuses=lambda config: "is not written in this layout, which is read alone; use --layout=mae_jax",
)
