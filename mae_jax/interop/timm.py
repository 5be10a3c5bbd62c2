"""Export to timm's VisionTransformer, as weights or a folder for the Hugging Face Hub; `mae.from_mae` reads it back.

timm's names are those of MAE's released code. DeiT III's models have LayerScale, and position embeddings of the patches
only.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.interop.layouts import Exported, Layout, mixture
from mae_jax.interop.mae import to_mae
from mae_jax.ops.batch_norm import EPS
from mae_jax.ops.patches import MEAN, STD, PatchGrid
from mae_jax.param_tree import flatten, nest

PRETRAINING = r"decoder/|encoder/mask_token$"  # left out: timm has no decoder, and mask tokens would mean DINOv2
ARCHITECTURES = {  # (width, depth, heads) → architecture; any name works, since all arguments are given too
    (192, 12, 3): "vit_tiny_patch16_224", (384, 12, 6): "vit_small_patch16_224", (768, 12, 12): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224", (1280, 32, 16): "vit_huge_patch14_224",
}
SCALE = r"encoder/block_0*(\d+)/(ls[12])/gamma$"


def to_timm(params: Any, grid: tuple[int, int], patch: tuple[int, int]) -> dict[str, np.ndarray]:
    """Converts encoder and classifier to a float32 state dict of the VisionTransformer with `timm_arguments`.

    Arguments and errors are those of `to_mae`. A decoder and mask tokens are left out.
    """
    flat = {path: leaf for path, leaf in flatten(params).items() if not re.match(PRETRAINING, path)}
    scales = {path: np.asarray(flat.pop(path)) for path in list(flat) if re.match(SCALE, path)}
    state = to_mae(nest(flat), grid, patch)
    if scales:
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state | {re.sub(SCALE, r"blocks.\1.\2.gamma", path): leaf for path, leaf in scales.items()}


def timm_arguments(config: ConfigDict, classes: int) -> dict[str, Any]:
    """Returns the arguments of timm.models.VisionTransformer for a config; `classes` is 0 for an encoder only."""
    m = config.model
    arguments = {
        "img_size": tuple(config.data.image_size), "patch_size": tuple(m.patch), "embed_dim": m.width,
        "depth": m.depth, "num_heads": m.heads, "mlp_ratio": m.mlp_ratio, "num_classes": classes,
        "global_pool": "avg" if m.pool == "mean" else "token",
        # With average pooling, a fine-tuned classifier has its norm after the pooling; others have it before.
        "fc_norm": m.pool == "mean" and config.method.name != "segment" and config.method.get("head") == "linear",
    }
    if m.gelu == "tanh":
        arguments["act_layer"] = "gelu_tanh"
    return arguments | ({"init_values": m.layer_scale, "no_embed_class": True} if m.layer_scale else {})


def folded(params: Mapping[str, Any], extras: Mapping[str, Any]) -> dict[str, Any]:
    """Folds the batch norm of a linear probe (MAE A.1) into its head; returns other parameters unchanged."""
    if "batch_norm" not in extras:
        return dict(params)
    mean, variance = (np.asarray(extras["batch_norm"][name], np.float64) for name in ("mean", "var"))
    kernel = np.asarray(params["head"]["kernel"], np.float64) / np.sqrt(variance + EPS)[:, None]
    head = {"kernel": kernel, "bias": params["head"]["bias"] - mean @ kernel}
    return {**params, "head": {name: array.astype(np.float32) for name, array in head.items()}}


def _described(config: ConfigDict, state: Mapping[str, np.ndarray]) -> str:
    arguments = timm_arguments(config, len(state.get("head.bias", ())))
    return f"VisionTransformer({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"


def _beside(exported: Exported) -> dict[str, str]:
    """Returns a config.json like that of timm's `push_to_hf_hub`."""
    config, outputs = exported.config, exported.outputs
    m, arguments = config.model, timm_arguments(config, outputs)
    said = {
        "architecture": ARCHITECTURES.get((m.width, m.depth, m.heads), "vit_base_patch16_224"),
        "num_classes": outputs, "num_features": m.width, "global_pool": arguments["global_pool"],
        "model_args": {name: value for name, value in arguments.items() if name != "num_classes"},
        "pretrained_cfg": {
            "tag": "mae_jax", "custom_load": False, "input_size": [3, *config.data.image_size],
            "fixed_input_size": True, "interpolation": "bicubic", "crop_pct": config.eval.crop_ratio[0],
            "crop_mode": "center", "mean": list(MEAN), "std": list(STD), "num_classes": outputs, "pool_size": None,
            "first_conv": "patch_embed.proj", "classifier": "head",
            **({"label_names": list(exported.classes)} if exported.classes else {}),
        },
    }
    return {"config.json": json.dumps(said, indent=2) + "\n"}


def _loading(exported: Exported) -> str:
    return f"""import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
outputs = model(transform(image)[None])  # {'logits' if exported.outputs else 'features, as they are pooled'}"""


LAYOUT = Layout(  # the layout `mae` reads it
    to=lambda params, config: to_timm(params, PatchGrid.of(config).shape, config.model.patch),
    refuses=mixture,
    whole=lambda config: config.method.name == "supervised",
    describe=_described,
    beside=_beside,
    loading=_loading,
    library="timm",
)
