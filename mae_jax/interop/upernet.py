"""Converts UperNet on a plain ViT between our parameters and the layouts of transformers and mmsegmentation.

transformers: UperNetForSemanticSegmentation on BEiT's backbone. mmsegmentation: its head on the backbones of BEiT's and
MAE's segmentation code.

Convolution kernels are [out, in, row, column] there and [row, column, in, out] here; transposed ones are
[in, out, row, column] and [in, row, column, out]. BEiT's keys have no bias: it is read as zero, and not written, since
it does not change attention. The position embedding of the class token is added to the token; it is written as zero.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.errors import UserError, printable
from mae_jax.interop.layouts import Exported, Layout
from mae_jax.models.blocks import BIAS_TABLE
from mae_jax.models.map_norms import EPS, MOMENTS
from mae_jax.models.upernet import POOLED, has_small_patches, map_blocks
from mae_jax.ops.patches import MEAN, STD
from mae_jax.param_tree import flatten, nest

ATTENTION = "attention.attention."
TABLE = f"{ATTENTION}relative_position_bias.relative_position_bias_table"
BLOCKS = re.compile(r"backbone\.encoder\.layer\.(\d+)\.(.+)")
BLOCK = (  # name after the block number: transformers', ours
    ("layernorm_before.", "norm1/"), ("layernorm_after.", "norm2/"), ("attention.output.dense.", "attn/proj/"),
    ("intermediate.dense.", "mlp/fc1/"), ("output.dense.", "mlp/fc2/"), (TABLE, f"attn/{BIAS_TABLE}"),
    ("lambda_1", "ls1/gamma"), ("lambda_2", "ls2/gamma"),
)
OTHERS = (  # prefixes outside of blocks: transformers', ours; # is a number
    ("backbone.embeddings.patch_embeddings.projection.", "encoder/patch_embed/"),
    ("backbone.embeddings.cls_token", "encoder/cls_token"),
    ("backbone.embeddings.position_embeddings", "encoder/pos_embed"),
    ("backbone.fpn1.0.", "upernet/rescale_0/double/"),
    ("backbone.fpn1.1.", "upernet/rescale_0/norm/"),
    ("backbone.fpn1.3.", "upernet/rescale_0/double_again/"),
    ("backbone.fpn2.0.", "upernet/rescale_1/double/"),
    ("decode_head.psp_modules.#.1.", "upernet/pool_#/"),
    ("decode_head.bottleneck.", "upernet/pool/"),
    ("decode_head.lateral_convs.#.", "upernet/lateral_#/"),
    ("decode_head.fpn_convs.#.", "upernet/pyramid_#/"),
    ("decode_head.fpn_bottleneck.", "upernet/fuse/"),
    ("decode_head.classifier.", "upernet/main_classes/classifier/"),
    ("auxiliary_head.convs.0.", "upernet/aux/"),
    ("auxiliary_head.classifier.", "upernet/aux_classes/classifier/"),
)
MMSEG_BLOCK = (  # name after the block number: transformers', that of BEiT's and MAE's segmentation code
    ("layernorm_before.", "norm1."), ("layernorm_after.", "norm2."), ("attention.output.dense.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."), ("output.dense.", "mlp.fc2."),
    (TABLE, "attn.relative_position_bias_table"), ("lambda_", "gamma_"),
)
MMSEG = (  # likewise the prefixes outside of blocks
    ("backbone.embeddings.patch_embeddings.projection.", "backbone.patch_embed.proj."),
    ("backbone.embeddings.cls_token", "backbone.cls_token"),
    ("backbone.embeddings.position_embeddings", "backbone.pos_embed"),
)
MMSEG_LAYERS = ((".batch_norm.", ".bn."), (".classifier.", ".conv_seg."))
QKV = re.compile(r"attn\.(?:qkv\.(weight|bias)|([qv])_bias)")
PARTS = ("query", "key", "value")
NO_PARAMETER = ("num_batches_tracked", "relative_position_index")
LEAVES = {"running_mean": "mean", "running_var": "var"}  # of a batch norm
KIND = "UperNetForSemanticSegmentation"
ACTIVATIONS = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}


def from_mmseg(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our parameters, as `from_hf`, from a state dict of mmsegmentation's head on BEiT's or MAE's backbone."""
    renamed: dict[str, Any] = {}
    for key, value in state.items():
        block = re.fullmatch(r"backbone\.blocks\.(\d+)\.(.+)", key)
        start = f"backbone.encoder.layer.{block[1]}." if block else ""
        found = QKV.fullmatch(block[2]) if block else None
        if found and found[1]:
            for part, rows in zip(PARTS, np.split(np.asarray(value), 3), strict=True):
                renamed[f"{start}{ATTENTION}{part}.{found[1]}"] = rows
        elif found:
            renamed[f"{start}{ATTENTION}{ {'q': 'query', 'v': 'value'}[found[2]]}.bias"] = value
        elif block:
            renamed[start + (_renamed(block[2], MMSEG_BLOCK, back=True) or block[2])] = value
        else:
            name = _renamed(key, MMSEG, back=True) or key
            for theirs, ours in MMSEG_LAYERS:
                name = name.replace(ours, theirs)
            renamed[name] = value
    return from_hf(renamed)


def to_mmseg(params: Any, config: ConfigDict) -> dict[str, np.ndarray]:
    """Returns the arrays of `to_hf` with the names of mmsegmentation's head on BEiT's and MAE's backbone."""
    whole, state = to_hf(params, config), {}
    for key, value in whole.items():
        block = BLOCKS.fullmatch(key)
        if not block:
            name = _renamed(key, MMSEG) or key
            for theirs, ours in MMSEG_LAYERS:
                name = name.replace(theirs, ours)
            state[name] = value
            continue
        start, rest = f"backbone.blocks.{block[1]}.", block[2].removeprefix(ATTENTION)
        if rest == block[2] or block[2] == TABLE:
            state[start + _renamed(block[2], MMSEG_BLOCK)] = value
        elif rest.endswith(".bias"):
            state[f"{start}attn.{rest[0]}_bias"] = value
        elif rest == "query.weight":
            fused = [whole[key.replace("query", part)] for part in PARTS]
            state[f"{start}attn.qkv.weight"] = np.concatenate(fused)
    return state


def from_hf(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our parameters, float32, from a state dict of transformers; 'extras' has the moments of batch norms.

    Raises:
      UserError: an unknown or a missing key.
    """
    params: dict[str, np.ndarray] = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, value in state.items():
        array = np.asarray(value, np.float32)
        if key.endswith(NO_PARAMETER):
            continue
        block = BLOCKS.fullmatch(key)
        if block and block[2].startswith(ATTENTION) and block[2] != TABLE:
            place = f"encoder/block_{int(block[1]):02d}/attn/qkv"
            parts.setdefault(place, {})[block[2].removeprefix(ATTENTION)] = array
            continue
        name = _path(key, block)
        params[name] = _ours(name, array)
    for name, fused in parts.items():
        for part in PARTS:
            for leaf in ("weight", "bias"):
                if f"{part}.{leaf}" not in fused and (part, leaf) != ("key", "bias"):
                    raise UserError(f"an UperNet on BEiT's or MAE's backbone has {ATTENTION}{part}.{leaf} in each "
                                    f"block; {name.rsplit('/', 2)[0]} has none")
        fused.setdefault("key.bias", np.zeros_like(fused["query.bias"]))
        params[f"{name}/kernel"] = np.concatenate([fused[f"{part}.weight"].T for part in PARTS], 1)
        params[f"{name}/bias"] = np.concatenate([fused[f"{part}.bias"] for part in PARTS])
    if "encoder/cls_token" not in params:
        raise UserError("an UperNet on BEiT's or MAE's backbone has backbone.embeddings.cls_token; it is missing")
    if "encoder/pos_embed" in params:
        table = params["encoder/pos_embed"][0]
        params["encoder/cls_token"] = params["encoder/cls_token"] + table[:1]
        params["encoder/pos_embed"] = table[1:]
    return nest(params)


def to_hf(params: Any, config: ConfigDict) -> dict[str, np.ndarray]:
    """Returns the state dict of transformers, float32, for the parameters of `written` and the moments of batch norms.

    Raises:
      UserError: a parameter has no counterpart there.
    """
    state: dict[str, np.ndarray] = {}
    for path, leaf in flatten(written(params)).items():
        array = np.asarray(leaf, np.float32)
        block = re.fullmatch(r"encoder/block_0*(\d+)/(.+)", path)
        if not block:
            state[_key(path)] = _theirs(path, array, config)
            if path.endswith("/var"):  # torch's batch norm also has a counter, which is not used here
                state[_key(path).replace("running_var", NO_PARAMETER[0])] = np.zeros((), np.float32)
        elif block[2].startswith("attn/qkv/"):
            name = f"backbone.encoder.layer.{block[1]}.{ATTENTION}"
            for part, rows in zip(PARTS, np.split(array.T, 3), strict=True):
                if block[2].endswith("/kernel") or part != "key":
                    state[f"{name}{part}.{'weight' if array.ndim == 2 else 'bias'}"] = np.ascontiguousarray(rows)
        else:
            name = _renamed(_their_leaf(block[2]), BLOCK, back=True)
            if not name:
                raise UserError(f"the parameter {path} has no place in BEiT's backbone")
            state[f"backbone.encoder.layer.{block[1]}.{name}"] = _theirs(path, array, config)
    return state


def written(params: Any) -> dict[str, Any]:
    """Returns the parameters of an UperNet that the other layouts hold.

    The encoder's last norm, which UperNet does not use, is removed, and biases of keys, which do not change attention,
    are set to zero.
    """
    flat = {name: np.asarray(leaf) for name, leaf in flatten(params).items() if not name.startswith("encoder/norm/")}
    for name, leaf in flat.items():
        if name.endswith("attn/qkv/bias"):
            query, key, value = np.split(leaf, 3)
            flat[name] = np.concatenate([query, np.zeros_like(key), value])
    return nest(flat)


def refuses(config: ConfigDict) -> str:
    """Returns why these layouts cannot hold a run, as the end of a sentence; '' if they can."""
    m, (height, width), (rows, columns) = config.method, config.data.image_size, config.model.patch
    if m.name != "segment" or m.head != "upernet":
        return "is no UperNet (configs/upernet.py), whose layout this is; use --layout=timm or hf"
    if m.norm != "batch" or m.encoder_norm:
        what = "layer norm" if m.norm != "batch" else "the encoder's norm on its maps (method.encoder_norm)"
        return f"has {what}, which UperNet on BEiT's backbone has not; use --layout=mae_jax"
    if config.model.positions == "fixed":
        return "has no table of positions, which BEiT's backbone holds: it takes model.positions=learned"
    if has_small_patches(config):
        return "has patches of 8 pixels or fewer, for which these layouts have no pyramid; use --layout=mae_jax"
    if len(set(map_blocks(config))) < 4:
        return "takes a map of one block twice, which BEiT's backbone gives once; use --layout=mae_jax"
    if height != width or rows != columns:
        return (f"has images of {height}x{width} pixels in patches of {rows}x{columns}, and BEiT's backbone takes "
                "squares alone; use --layout=mae_jax")
    return ""


def _renamed(name: str, table: Iterable[tuple[str, str]], back: bool = False) -> str:
    """Replaces the prefix of a name by its counterpart in a table; '' if the table lacks it. # stands for a number."""
    for pair in table:
        begin, other = reversed(pair) if back else pair
        if found := re.match(re.escape(begin).replace(r"\#", r"(\d+)"), name):
            return other.replace("#", found[1] if found.groups() else "#") + name[found.end():]
    return ""


def _path(key: str, block: re.Match[str] | None) -> str:
    """Returns our path for a key of transformers; raises UserError for an unknown key."""
    found = _renamed(block[2], BLOCK) if block else _renamed(key, OTHERS)
    if not found:
        raise UserError(f"{printable(block[2])} is no part of a block of BEiT" if block else
                        f"{printable(key)} is no part of an UperNet on BEiT's or MAE's backbone")
    name = f"encoder/block_{int(block[1]):02d}/{found}" if block else found
    name = name.replace("/conv.", "/").replace("/batch_norm.", "/norm/")
    start, _, leaf = name.rpartition("/")
    if leaf in LEAVES:
        return f"extras/{MOMENTS}/{start.removeprefix('upernet/')}/{LEAVES[leaf]}"
    if leaf == "weight":
        leaf = "scale" if start.endswith(("norm", "norm1", "norm2")) else "kernel"
    return f"{start}/{leaf}"


def _their_leaf(path: str) -> str:
    """Returns a path with transformers' name of its leaf."""
    start, _, leaf = path.rpartition("/")
    theirs = {"kernel": "weight", "scale": "weight", **{ours: name for name, ours in LEAVES.items()}}
    return f"{start}/{theirs.get(leaf, leaf)}"


def _key(path: str) -> str:
    """Returns transformers' key for a path of ours outside of blocks; raises UserError if there is none."""
    name = _their_leaf(re.sub(rf"^extras/{MOMENTS}/", "upernet/", path))
    key = _renamed(name, OTHERS, back=True)
    if not key:
        raise UserError(f"the parameter {path} has no place in an UperNet on BEiT's backbone")
    if key.startswith(("decode_head.", "auxiliary_head.")) and ".classifier." not in key:
        start, _, leaf = key.rpartition("norm/")
        return f"{start}batch_norm.{leaf}" if start else re.sub(r"([^.]+)$", r"conv.\1", key)
    return key


def _ours(name: str, array: np.ndarray) -> np.ndarray:
    """Transposes a parameter of transformers to our order of axes; `name` is our path."""
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


def _theirs(path: str, array: np.ndarray, config: ConfigDict) -> np.ndarray:
    """Transposes a parameter to transformers' order of axes; `path` is our path."""
    if path == "encoder/pos_embed":
        return np.pad(array, ((1, 0), (0, 0)))[None]
    if not path.endswith("/kernel"):
        return array
    if "/double" in path:
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    if path == "encoder/patch_embed/kernel":
        array = array.reshape(*config.model.patch, 3, -1)
    elif path.startswith("upernet/") and array.ndim == 2:
        array = array[None, None]
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T)


def hf_config(config: ConfigDict) -> dict[str, Any]:
    """Returns the config.json of transformers' UperNetForSemanticSegmentation."""
    m, side, classes = config.model, config.data.image_size[0], config.method.classes
    backbone = {
        "model_type": "beit", "hidden_size": m.width, "num_hidden_layers": m.depth, "num_attention_heads": m.heads,
        "intermediate_size": m.mlp_ratio * m.width, "hidden_act": ACTIVATIONS[m.gelu], "layer_norm_eps": 1e-6,
        "image_size": side, "patch_size": m.patch[0], "layer_scale_init_value": m.layer_scale, "drop_path_rate": 0.0,
        "use_absolute_position_embeddings": True, "use_mask_token": False, "add_fpn": True,
        "batch_norm_eps": EPS,  # transformers 4 reads it, and has no default
        "use_relative_position_bias": config.method.relative_position_bias, "reshape_hidden_states": True,
        "out_features": [f"stage{block + 1}" for block in map_blocks(config)]}
    names = {str(number): f"LABEL_{number}" for number in range(classes)}
    return {
        "model_type": "upernet", "architectures": [KIND], "backbone_config": backbone,
        "hidden_size": config.method.head_width or m.width, "pool_scales": list(POOLED), "use_auxiliary_head": True,
        "auxiliary_loss_weight": config.method.aux_weight, "auxiliary_in_channels": m.width,
        "auxiliary_channels": config.method.aux_width, "auxiliary_num_convs": 1, "auxiliary_in_index": 2,
        "loss_ignore_index": 255, "id2label": names, "label2id": {name: int(key) for key, name in names.items()}}


def hf_beside(exported: Exported) -> dict[str, str]:
    """Returns file name → content of config.json and preprocessor_config.json (images resized as a whole)."""
    side = exported.config.data.image_size[0]
    images = {
        "image_processor_type": "SegformerImageProcessor", "do_resize": True, "size": {"height": side, "width": side},
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(MEAN),
        "image_std": list(STD), "do_reduce_labels": exported.config.data.mask_offset == 1}
    return {name: json.dumps(content, indent=2) + "\n" for name, content in
            (("config.json", hf_config(exported.config)), ("preprocessor_config.json", images))}


HF_LOADING = f"""import transformers

processor = transformers.AutoImageProcessor.from_pretrained("FOLDER")
model = transformers.{KIND}.from_pretrained("FOLDER").eval()
logits = model(**processor(image, return_tensors="pt")).logits  # [B, classes, height, width], in the model's size"""
LAYOUT = Layout(
    to=to_mmseg,
    from_=lambda state, config: from_mmseg(state),
    recognizes=lambda names: any(name.startswith("decode_head.") for name in names),
    refuses=refuses,
    part=lambda params, config: written(params),
    files=(".pth", ".safetensors"),
    loading=lambda exported: """import safetensors.torch

state = safetensors.torch.load_file("FOLDER/model.safetensors")
model.load_state_dict(state, strict=False)  # of mmsegmentation's EncoderDecoder; indices of positions are its own""",
)
