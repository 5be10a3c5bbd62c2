"""Converts Hugging Face's ViTMAE and ViT to and from our parameters, and writes folders for transformers.

ViTMAEForPreTraining has a decoder, ViTForImageClassification a classifier of the class token, ViTModel neither. Names
differ from those of the published code, and query, key and value are separate. We write the names of transformers 4:
version 5 renames them when it loads, while version 4 would leave parameters with the names of version 5 random. Both
are read. UperNet is in `upernet`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.errors import UserError, printable
from mae_jax.interop import upernet
from mae_jax.interop.layouts import Exported, Layout, mixture, nearest
from mae_jax.interop.mae import expected, from_mae, to_mae
from mae_jax.ops.patches import MEAN, STD, PatchGrid

# Prefixes in the published code, in transformers 4 and, if it differs, in transformers 5.
PARTS = (
    ("cls_token", "vit.embeddings.cls_token"),
    ("pos_embed", "vit.embeddings.position_embeddings"),
    ("patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
    ("norm.", "vit.layernorm."),
    ("blocks.", "vit.encoder.layer.", "vit.layers."),
    ("decoder_blocks.", "decoder.decoder_layers.", "decoder.decoder_encoder.layer."),
    ("decoder_", "decoder.decoder_"),
    ("mask_token", "decoder.mask_token"),
    ("head.", "classifier."),
)
# Names after the block number, likewise; the published code has query, key and value in one array.
OF_BLOCKS = (
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("attn.q.", "attention.attention.query.", "attention.q_proj."),
    ("attn.k.", "attention.attention.key.", "attention.k_proj."),
    ("attn.v.", "attention.attention.value.", "attention.v_proj."),
    ("attn.proj.", "attention.output.dense.", "attention.o_proj."),
    ("mlp.fc1.", "intermediate.dense.", "mlp.fc1."),
    ("mlp.fc2.", "output.dense.", "mlp.fc2."),
)
FUSED = re.compile(r"(.+\.attn)\.([qkv])\.(weight|bias)")
ACTIVATIONS = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}
PRETRAINING, CLASSIFIER, ENCODER = "ViTMAEForPreTraining", "ViTForImageClassification", "ViTModel"
UNNAMED = "LABEL_{}"  # transformers' name of a class without a name


def to_hf(params: Any, grid: tuple[int, int], patch: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns the state dict of ViTMAEForPreTraining or, with a head, of ViTForImageClassification, float32.

    Arguments and errors are those of `to_mae`. For an encoder alone, these are the arrays under 'vit.' of both classes.
    """
    state = {}
    for key, array in to_mae(params, grid, patch).items():
        for one, part in _apart(key, array).items():
            (name, *_) = _written(one)
            if not name:
                raise UserError(f"{key} has no place in transformers' ViT, which classifies the class token; write the "
                                "classifier of a mean with --layout=timm")
            state[name] = part
    return state


def from_hf(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our parameters, float32, from a state dict of ViTMAEForPreTraining or, without a decoder, ViTMAEModel.

    ViTModel, whose pooler is dropped, and ViTForImageClassification have the same names.

    Args:
      state: key → array (NumPy, or anything that np.asarray takes), named as in any version of transformers. The prefix
        'vit.', which ViTMAEModel's own files lack, may be missing.

    Raises:
      UserError: an unknown or missing key, or a decoder without the fixed sine-cosine positions.
    """
    whole = {_read(key): value for key, value in state.items() if not key.removeprefix("vit.").startswith("pooler.")}
    rows = np.shape(whole.get("pos_embed", np.zeros((1, 1))))[1]
    return from_mae(_fused(whole), (1, rows - 1))  # with a class token always, whatever the grid


def hf_config(config: ConfigDict, kind: str = PRETRAINING) -> dict[str, Any]:
    """Returns the fields of ViTMAEConfig or ViTConfig for our config and a class of transformers.

    The epsilon of layer norms is MAE's, 1e-6; transformers' default is 1e-12.
    """
    m, (height, width) = config.model, config.data.image_size
    fields = {
        "hidden_size": m.width, "num_hidden_layers": m.depth, "num_attention_heads": m.heads,
        "intermediate_size": m.mlp_ratio * m.width, "hidden_act": ACTIVATIONS[m.gelu], "layer_norm_eps": 1e-6,
        "image_size": height if height == width else [height, width],
        "patch_size": m.patch[0] if m.patch[0] == m.patch[1] else list(m.patch), "qkv_bias": True,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }
    if kind == PRETRAINING:
        d = config.method
        fields |= {
            "decoder_num_attention_heads": d.decoder_heads, "decoder_hidden_size": d.decoder_width,
            "decoder_num_hidden_layers": d.decoder_depth, "decoder_intermediate_size": m.mlp_ratio * d.decoder_width,
            "mask_ratio": d.mask_ratio, "norm_pix_loss": d.target == "norm_pix",
        }
    if kind == ENCODER:  # its pooler is the identity (`_in_folder`)
        fields["pooler_act"] = "linear"
    return fields


def _written(key: str, every: bool = False) -> tuple[str, ...]:
    """Returns transformers 4's name for a name in the published code, '' if none; with `every`, version 5's, too."""
    names = (_renamed(key, {ours: names[place] for ours, *names in PARTS},
                      {ours: names[place] for ours, *names in OF_BLOCKS}) for place in ((0, -1) if every else (0,)))
    return tuple(names)


def _read(key: str) -> str:
    """Returns the published code's name for a name in any version of transformers; raises UserError."""
    full = key if key.startswith(("vit.", "decoder.", "classifier.")) else f"vit.{key}"
    known = _renamed(full, {name: ours for ours, *names in PARTS for name in names},
                     {name: ours for ours, *names in OF_BLOCKS for name in names})
    if not known:
        olds = [one for old in expected(key) for one in _apart(old, np.zeros(3))]
        there = [name for one in olds for name in _written(one, every=True)]
        raise UserError(f"{printable(key)} is no parameter of transformers' ViT or ViTMAE; {nearest(full, there)}")
    return known


def _renamed(key: str, parts: Mapping[str, str], of_blocks: Mapping[str, str]) -> str:
    """Replaces the prefix of a key and the name after its block number; '' if a table lacks one of them."""
    start = next((part for part in parts if key.startswith(part)), "")
    rest = key.removeprefix(start)
    number, _, leaf = rest.partition(".")
    if start and number.isdigit():
        name = next((name for name in of_blocks if leaf.startswith(name)), "")
        rest = f"{number}.{of_blocks[name]}{leaf.removeprefix(name)}" if name else ""
    return f"{parts[start]}{rest}" if (start and rest) or key == start else ""


def _apart(key: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Splits a fused qkv array, [3 D, ...], into query, key and value; returns other arrays unchanged."""
    if ".attn.qkv." not in key:
        return {key: array}
    return {key.replace(".qkv.", f".{letter}."): part for letter, part in zip("qkv", np.split(array, 3), strict=True)}


def _fused(state: Mapping[str, Any]) -> dict[str, Any]:
    """Concatenates query, key and value arrays, in this order, to the published code's fused ones; raises UserError."""
    fused = {}
    for key, value in state.items():
        match = FUSED.fullmatch(key)
        if not match:
            fused[key] = value
            continue
        names = [f"{match[1]}.{letter}.{match[3]}" for letter in "qkv"]
        for name in names:
            if name not in state:
                raise UserError(f"{_written(key)[0]} is there, but {_written(name)[0]} is missing")
        fused[f"{match[1]}.qkv.{match[3]}"] = np.concatenate([np.asarray(state[name]) for name in names])
    return fused


def _refuses(config: ConfigDict) -> str:
    m, name, (height, width), (rows, columns) = config.model, config.method.name, config.data.image_size, \
        config.model.patch
    if why := mixture(config):
        return why
    if has_upernet(config):
        return upernet.refuses(config)
    if m.layer_scale:
        return "has LayerScale, which transformers' ViT has not: use --layout=timm"
    if name == "supervised" and m.pool == "mean":
        return ("classifies the mean of the patches, and transformers' ViTForImageClassification the class token: use "
                "--layout=timm")
    if height != width or rows != columns:
        return (f"has images of {height}x{width} pixels in patches of {rows}x{columns}, and transformers' ViTMAE takes "
                "squares alone: use --layout=timm for the encoder, --layout=mae for all")
    return ""


def has_upernet(config: ConfigDict) -> bool:
    """Returns whether a run trains UperNet, which is then exported, too."""
    return config.method.name == "segment" and config.method.head == "upernet"


def kind_of(params: Any) -> str:
    """Returns the name of the class in transformers that has these parameters."""
    if "upernet" in params:
        return upernet.KIND
    return PRETRAINING if "decoder" in params else CLASSIFIER if "head" in params else ENCODER


def _in_folder(params: Any, config: ConfigDict) -> dict[str, np.ndarray]:
    """Returns the arrays of a folder by their names in transformers.

    ViTModel has no prefix, and gets a pooler that is the identity: transformers would initialize a random one, and
    return its output as the model's.
    """
    if kind_of(params) == upernet.KIND:
        return upernet.to_hf(params, config)
    if kind_of(params) == ENCODER:  # BEiT's mask token is for pre-training only, like a decoder
        params = {"encoder": {name: leaf for name, leaf in params["encoder"].items() if name != "mask_token"}}
    state = to_hf(params, PatchGrid.of(config).shape, config.model.patch)
    if kind_of(params) != ENCODER:
        return state
    width = config.model.width
    pooler = {"pooler.dense.weight": np.eye(width, dtype=np.float32), "pooler.dense.bias": np.zeros(width, np.float32)}
    return {name.removeprefix("vit."): array for name, array in state.items()} | pooler


def distinct(names: Sequence[str]) -> list[str]:
    """Appends its number to each class name that occurs twice (ImageNet has two cranes).

    Otherwise label2id, which maps a name to a number, would lose a class.
    """
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names)]


def _beside(exported: Exported) -> dict[str, str]:
    """Returns file name → content of config.json and preprocessor_config.json (preprocessing as in evaluation)."""
    config, kind = exported.config, kind_of(exported.params)
    if kind == upernet.KIND:
        return upernet.hf_beside(exported)
    said = {"model_type": "vit_mae" if kind == PRETRAINING else "vit", "architectures": [kind],
            **hf_config(config, kind)}
    if kind == CLASSIFIER:
        names = exported.classes or [UNNAMED.format(number) for number in range(exported.outputs)]
        names = distinct(names)
        several = config.method.get("multi_label", False)
        said |= {"id2label": {str(number): name for number, name in enumerate(names)},
                 "label2id": {name: number for number, name in enumerate(names)},
                 "problem_type": f"{'multi' if several else 'single'}_label_classification"}
    side = config.data.image_size[0]
    images = {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": round(side / config.eval.crop_ratio[0])}, "resample": 3,  # bicubic
        "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD),
    }
    return {name: json.dumps(content, indent=2) + "\n" for name, content in
            (("config.json", said), ("preprocessor_config.json", images))}


def _loading(exported: Exported) -> str:
    kind = kind_of(exported.params)
    if kind == upernet.KIND:
        return upernet.HF_LOADING
    shown = {PRETRAINING: "logits  # [B, N, P], the pixels that the decoder predicts, of a random mask",
             CLASSIFIER: "logits.softmax(-1)  # [B, classes]",
             ENCODER: "last_hidden_state  # [B, 1 + N, D], the class token first"}[kind]
    encoder = """
# The encoder alone, of whole images; ViTMAEModel would mask them.
encoder = transformers.ViTModel.from_pretrained("FOLDER", add_pooling_layer=False)""" if kind == PRETRAINING else ""
    return f"""import transformers

processor = transformers.AutoImageProcessor.from_pretrained("FOLDER")
model = transformers.{kind}.from_pretrained("FOLDER")
outputs = model(**processor(image, return_tensors="pt")).{shown}{encoder}"""


LAYOUT = Layout(
    to=_in_folder,
    from_=lambda state, config: (upernet.from_hf if upernet.LAYOUT.recognizes(state) else from_hf)(state),
    recognizes=lambda names: any(name.startswith(("vit.", "embeddings.")) for name in names),
    refuses=_refuses,
    whole=lambda config: config.method.name in ("mae", "supervised") or has_upernet(config),
    part=lambda params, config: upernet.written(params) if has_upernet(config) else params,
    files=(),
    beside=_beside,
    loading=_loading,
    library="transformers",
)
