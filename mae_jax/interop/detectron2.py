"""Conversion between mae_jax's parameters and those of Detectron2's Mask R-CNN and Cascade Mask R-CNN on ViTDet.

torch stores a convolution's weight as [out, in, row, column] and a transposed convolution's as [in, out, row, column];
mae_jax as [row, column, in, out] and [in, row, column, out]. The first linear layer of the box head takes a region
ordered by (channel, row, column) in Detectron2 and by (row, column, channel) here. Detectron2's position embeddings
begin with a row for a class token, although ViTDet has none; this row is written as zeros.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.errors import UserError, printable
from mae_jax.interop.layouts import Layout, nearest
from mae_jax.models.detection import BOX_SIDE
from mae_jax.param_tree import flatten, nest

# Buffers in a state dict, which are not parameters.
BUFFERS = re.compile(r"pixel_(mean|std)|proposal_generator\.anchor_generator\..*|.*\.num_batches_tracked")
PYRAMID = {  # layer of mae_jax → layer of Detectron2; the scales 4, 2, 1 and 1/2 are simfp_2 to simfp_5
    "scale0/deconv1": "simfp_2.0", "scale0/norm": "simfp_2.1", "scale0/deconv2": "simfp_2.3", "lateral0": "simfp_2.4",
    "output0": "simfp_2.5", "scale1/deconv1": "simfp_3.0", "lateral1": "simfp_3.1", "output1": "simfp_3.2",
    "lateral2": "simfp_4.0", "output2": "simfp_4.1", "lateral3": "simfp_5.1", "output3": "simfp_5.2"}
HEADS = {
    "proposals/logits": "proposal_generator.rpn_head.objectness_logits",
    "proposals/deltas": "proposal_generator.rpn_head.anchor_deltas", "masks/deconv": "roi_heads.mask_head.deconv",
    "masks/logits": "roi_heads.mask_head.predictor"}
NUMBERED = (  # pattern of mae_jax's paths → replacement with Detectron2's names
    (r"encoder/block_0*(\d+)/(attn/(?:qkv|proj)|mlp/fc[12]|norm[12])", r"backbone.net.blocks.\1.\2"),
    (r"encoder/block_0*(\d+)/attn/(rel_pos_[hw])", r"backbone.net.blocks.\1.attn.\2"),
    (r"encoder/patch_embed", "backbone.net.patch_embed.proj"),
    (r"encoder/pos_embed", "backbone.net.pos_embed"),
    (r"proposals/conv(\d+)", r"proposal_generator.rpn_head.conv.conv\1"),
    (r"masks/conv(\d+)", r"roi_heads.mask_head.mask_fcn\1"),
    (r"boxes(\d*)/(conv\d+|fc\d+)", r"roi_heads.box_head.\1.\2"),
    (r"boxes(\d*)/logits", r"roi_heads.box_predictor.\1.cls_score"),
    (r"boxes(\d*)/deltas", r"roi_heads.box_predictor.\1.bbox_pred"),
)


def to_detectron2(params: Any) -> dict[str, np.ndarray]:
    """Converts parameters of a detector (`method.pyramid=simple`, scales 4, 2, 1 and 1/2) to a float32 state dict.

    Raises:
      UserError: Detectron2's ViTDet does not have one of the parameters.
    """
    flat = flatten(params)
    stages = len({name.split("/")[0] for name in flat if name.startswith("boxes")})
    state = {}
    for path, leaf in flat.items():
        key = _key(path, stages)
        state[key] = _to(path, np.asarray(leaf, np.float32))
    return state


def from_detectron2(state: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a state dict of Detectron2 to parameters, float32; raises UserError for an unknown name."""
    arrays = {name: np.asarray(value, np.float32) for name, value in state.items() if not BUFFERS.fullmatch(name)}
    known = {_key(path, stages): path for stages in (1, 3) for path in _paths(arrays, stages)}
    found = {}
    for name, array in arrays.items():
        if name not in known:
            raise UserError(f"{printable(name)} is not a parameter of Detectron2's ViTDet; {nearest(name, known)}")
        found[known[name]] = _from(known[name], array)
    return nest(found)


def _paths(names: Iterable[str], stages: int) -> list[str]:
    """Returns mae_jax's paths of all parameters that a detector with these names in its state dict may have."""
    blocks = {int(match[1]) for name in names if (match := re.match(r"backbone\.net\.blocks\.(\d+)\.", name))}
    linear = ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    found = ["encoder/pos_embed", *_leaves("encoder/patch_embed")]
    for block in sorted(blocks):
        start = f"encoder/block_{block:02d}/"
        found += [f"{start}attn/rel_pos_{axis}" for axis in "hw"]
        found += [leaf for layer in linear for leaf in _leaves(start + layer)]
        found += [f"{start}{norm}/{leaf}" for norm in ("norm1", "norm2") for leaf in ("scale", "bias")]
    for layer in PYRAMID:
        norm = layer if "/norm" in layer else f"{layer}_norm"
        found += [f"pyramid/{norm}/{leaf}" for leaf in ("scale", "bias")] if "deconv" not in layer else []
        found += _leaves(f"pyramid/{layer}") if layer != norm else []
    boxes = ["boxes", "boxes1", "boxes2"][:stages]
    layers = [*HEADS, *(f"proposals/conv{k}" for k in range(9)), *(f"masks/conv{k}" for k in range(1, 9)),
              *(f"{box}/{layer}{k}" for box in boxes for layer in ("conv", "fc") for k in range(1, 9)),
              *(f"{box}/{layer}" for box in boxes for layer in ("logits", "deltas"))]
    found += [leaf for layer in layers for leaf in _leaves(layer)]
    return found + [f"{layer}_norm/{leaf}" for layer in layers if "conv" in layer for leaf in ("scale", "bias")]


def _leaves(layer: str) -> list[str]:
    return [f"{layer}/kernel", f"{layer}/bias"]


def _key(path: str, stages: int) -> str:
    """Returns Detectron2's name for a path of mae_jax."""
    layer, _, leaf = path.rpartition("/")
    own, name = ("", path) if leaf.startswith(("rel_pos", "pos_embed")) else (
        {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}.get(leaf, f".{leaf}"), layer)
    if name.endswith("_norm"):
        name, own = name.removesuffix("_norm"), f".norm{own}"
    if name in HEADS:
        return HEADS[name] + own
    if (level := name.removeprefix("pyramid/")) in PYRAMID and level != name:
        return f"backbone.{PYRAMID[level]}{own}"
    for pattern, theirs in NUMBERED:
        if re.fullmatch(pattern, name):
            key = re.sub(pattern, theirs, name).replace("/", ".")
            if stages > 1:
                key = key.replace("box_head..", "box_head.0.").replace("box_predictor..", "box_predictor.0.")
            return key.replace("..", ".") + own
    raise UserError(f"the parameter {path} has no place in Detectron2's ViTDet, which has a simple pyramid and no "
                    "class token")


def _to(path: str, leaf: np.ndarray) -> np.ndarray:
    if path == "encoder/pos_embed":
        return np.pad(leaf, ((1, 0), (0, 0)))[None]
    if path == "encoder/patch_embed/kernel":
        side = round((len(leaf) // 3) ** 0.5)
        return np.ascontiguousarray(leaf.reshape(side, side, 3, -1).transpose(3, 2, 0, 1))
    if leaf.ndim == 4:
        return np.ascontiguousarray(leaf.transpose((0, 3, 1, 2) if "deconv" in path else (3, 2, 0, 1)))
    if re.fullmatch(r"boxes\d*/fc1/kernel", path):
        cells = leaf.reshape(BOX_SIDE, BOX_SIDE, -1, leaf.shape[-1])
        return np.ascontiguousarray(cells.transpose(3, 2, 0, 1).reshape(leaf.shape[-1], -1))
    return np.ascontiguousarray(leaf.T) if path.endswith("/kernel") else leaf


def _from(path: str, array: np.ndarray) -> np.ndarray:
    if path == "encoder/pos_embed":
        return array[0, 1:]
    if path == "encoder/patch_embed/kernel":
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0).reshape(-1, len(array)))
    if array.ndim == 4:
        return np.ascontiguousarray(array.transpose((0, 2, 3, 1) if "deconv" in path else (2, 3, 1, 0)))
    if re.fullmatch(r"boxes\d*/fc1/kernel", path):
        cells = array.reshape(len(array), -1, BOX_SIDE, BOX_SIDE)
        return np.ascontiguousarray(cells.transpose(2, 3, 1, 0).reshape(-1, len(array)))
    return np.ascontiguousarray(array.T) if path.endswith("/kernel") else array


def _refuses(config: ConfigDict) -> str:
    m = config.method
    if m.name != "detection":
        return "is not a detector, as Detectron2's layout requires; export it with --layout=timm"
    norms = {m.norm, m.box_norm or m.norm}
    simple = m.pyramid == "simple" and tuple(m.scales) == (4.0, 2.0, 1.0, 0.5)
    if not simple or norms != {"layer"} or m.class_token:
        return "is not a ViTDet: Detectron2's layout requires method.pyramid=simple with four scales and layer norm"
    if config.model.positions != "learned":
        return "has no learned position embeddings: Detectron2's layout requires model.positions=learned"
    height, width = config.data.image_size
    if height != width:
        return f"has images of {height} x {width}, and Detectron2's positions are of square ones"
    return ""


LAYOUT = Layout(
    to=lambda params, config: to_detectron2(params),
    from_=lambda state, config: from_detectron2(state),
    recognizes=lambda names: any(name.startswith("backbone.simfp_") for name in names),
    refuses=_refuses,
    files=(".pth", ".safetensors"),
    loading=lambda exported: """import safetensors.torch

# `model` is of projects/ViTDet, made with model.backbone.net.pretrain_img_size = the side of the images here: its
# positions are of that size, and others do not load. Anchors and pixel statistics are its own.
state = safetensors.torch.load_file("FOLDER/model.safetensors")
model.load_state_dict(state, strict=False)""",
)
