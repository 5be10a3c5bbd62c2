"""Hugging Face's ViTMAEForPreTraining, to and from our parameter tree.

Its weights are those of the published code with query, key and value apart and other names. Names of transformers 5
are written; those of 4 and before are read as well.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.errors import UserError
from mae_jax.interop.layouts import Layout, mixture
from mae_jax.interop.mae import from_mae, to_mae
from mae_jax.ops.patches import PatchGrid

NAMES = (  # published code → transformers 5
    (r"^(cls_token)$", r"vit.embeddings.\1"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^norm\.", "vit.layernorm."),
    (r"^blocks\.", "vit.layers."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^(decoder_|mask_token)", r"decoder.\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
)
OLD = (  # transformers 4 → 5
    (r"^vit\.encoder\.layer\.", "vit.layers."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda match: f".attention.{match[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
BACK = (  # transformers 5 → published code
    (r"^vit\.embeddings\.(cls_token)$", r"\1"),
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^vit\.layers\.", "blocks."),
    (r"^decoder\.decoder_layers\.", "decoder_blocks."),
    (r"^decoder\.(decoder_|mask_token)", r"\1"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
)
THREE = ("q", "k", "v")
ACTIVATIONS = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}


def to_hf(params: Any, grid: tuple[int, int], patch: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns the state dict of ViTMAEForPreTraining, float32; arguments and errors as `to_mae`."""
    state = {}
    for key, array in to_mae(params, grid, patch).items():
        name = _renamed(key, NAMES)
        if not name.startswith(("vit.", "decoder.")):
            raise UserError(f"{key} has no place in ViTMAEForPreTraining; write a classifier with --layout=timm")
        if ".attn.qkv." in name:
            for letter, part in zip(THREE, np.split(array, 3), strict=True):
                state[name.replace(".attn.qkv.", f".attention.{letter}_proj.")] = part
        else:
            state[name] = array
    return state


def from_hf(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our parameters, float32, of a state dict of ViTMAEForPreTraining or, without decoder, ViTMAEModel.

    Args:
      state: key → array (NumPy, or anything that np.asarray takes), named as in any version of transformers. The prefix
        'vit.', which ViTMAEModel's own files lack, may be missing.

    Raises:
      UserError: an unknown or missing key, or a decoder without the fixed sine-cosine positions.
    """
    whole = {_renamed(key if key.startswith(("vit.", "decoder.")) else f"vit.{key}", (*OLD, *BACK)): value
             for key, value in state.items()}
    rows = np.shape(whole.get("pos_embed", np.zeros((1, 1))))[1]
    return from_mae(_fused(whole), (1, rows - 1))  # with a class token always, whatever the grid


def hf_config(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields of ViTMAEConfig for a config of ours; its own layer norm epsilon (1e-12) is not MAE's."""
    m, d = config.model, config.method
    height, width = config.data.image_size
    return {
        "hidden_size": m.width, "num_hidden_layers": m.depth, "num_attention_heads": m.heads,
        "intermediate_size": m.mlp_ratio * m.width, "hidden_act": ACTIVATIONS[m.gelu], "layer_norm_eps": 1e-6,
        "image_size": height if height == width else [height, width],
        "patch_size": m.patch[0] if m.patch[0] == m.patch[1] else list(m.patch), "qkv_bias": True,
        "decoder_num_attention_heads": d.decoder_heads, "decoder_hidden_size": d.decoder_width,
        "decoder_num_hidden_layers": d.decoder_depth, "decoder_intermediate_size": m.mlp_ratio * d.decoder_width,
        "mask_ratio": d.mask_ratio, "norm_pix_loss": d.target == "norm_pix",
    }


def _renamed(key: str, rules: tuple[tuple[str, Any], ...]) -> str:
    for pattern, name in rules:
        key = re.sub(pattern, name, key)
    return key


def _fused(state: Mapping[str, Any]) -> dict[str, Any]:
    """Stacks the query, key and value rows, in this order."""
    fused = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.+)\.attention\.[qkv]_proj\.(weight|bias)", key)
        if not match:
            fused[key] = value
            continue
        names = [f"{match[1]}.attention.{letter}_proj.{match[2]}" for letter in THREE]
        for name in names:
            if name not in state:
                raise UserError(f"{key} is there, but {name} is missing")
        fused[f"{match[1]}.attn.qkv.{match[2]}"] = np.concatenate([np.asarray(state[name]) for name in names])
    return fused


def _refuses(config: ConfigDict) -> str:
    name = config.method.name
    if name in ("mae", "supervised"):  # which have MAE's model, or a part of it that `to_hf` refuses by name
        return ""
    others = "--layout=timm" if config.model.layer_scale else "--layout=timm or --layout=mae"
    return mixture(config) or (f"was trained with method.name={name!r}; transformers has MAE's model: use {others} for "
                               "the encoder")


def _model_config(config: ConfigDict) -> dict[str, str]:
    described = {"model_type": "vit_mae", "architectures": ["ViTMAEForPreTraining"], **hf_config(config)}
    return {"config.json": json.dumps(described, indent=2) + "\n"}


LAYOUT = Layout(
    to=lambda params, config: to_hf(params, PatchGrid.of(config).shape, config.model.patch),
    from_=lambda state, config: from_hf(state),
    recognizes=lambda names: any(name.startswith("vit.") for name in names),
    refuses=_refuses,
    file="model.safetensors",
    beside=_model_config,
)
