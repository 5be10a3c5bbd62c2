"""Config fields of method.name=detection: validation, trained and decayed parameters, FLOPs of the forward pass."""

import itertools
import re
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.errors import UserError
from mae_jax.models.detection import BOX_SIDE, MASK_SIDE
from mae_jax.ops.flops import blocks_flops, conv_flops
from mae_jax.ops.patches import PatchGrid

SCALES = (4.0, 2.0, 1.0, 0.5)
POSITIVE = ("channels", "anchor_samples", "candidates", "proposals", "regions", "box_width", "max_detections",
            "anchor_sizes", "anchor_ratios", "scales")
NOT_NEGATIVE = ("classes", "window", "proposal_convs", "samples", "box_convs", "box_layers", "mask_convs", "beta",
                "stage_weights", "box_weight")
SHARES = ("anchor_positives", "anchor_overlaps", "least_overlap", "proposal_overlap", "region_positives",
          "stage_overlaps", "score", "overlap")


def check(config: ConfigDict) -> None:
    """Raises UserError for the first field of config.method with an invalid value."""
    m, depth = config.method, config.model.depth

    def refuse(key: str, expected: str) -> None:
        raise UserError(f"method.{key}={m[key]!r}; expected {expected}")

    for keys, fits, expected in ((POSITIVE, lambda x: x > 0, "more than 0"), (NOT_NEGATIVE, lambda x: x >= 0,
                                 "0 or more"), (SHARES, lambda x: 0 <= x <= 1, "0 to 1")):
        for key in keys:
            values = m[key] if isinstance(m[key], tuple) else (m[key],)
            if not values or not all(isinstance(x, int | float) and fits(x) for x in values):
                refuse(key, expected)
    if not -1 <= m.train_blocks <= depth:
        refuse("train_blocks", f"0 to {depth}, or -1 for the whole encoder")
    if m.allowed_border < -1:
        refuse("allowed_border", "0 or more pixels, or -1 for any number")
    for key in ("anchor_overlaps", "candidates", "proposals"):
        if len(m[key]) != 2:
            refuse(key, "two numbers")
    for count, share in (("anchor_samples", "anchor_positives"), ("regions", "region_positives")):
        if int(m[count] * m[share]) < 1:
            refuse(share, f"a share that is at least one of the method.{count}={m[count]}")
    for key in ("global_blocks", "map_blocks")[:1 + (m.pyramid == "blocks")]:  # 'simple' uses the last block only
        if list(m[key]) != sorted({block for block in m[key] if 0 <= block < depth}):
            refuse(key, f"some of the blocks 0 to {depth - 1}, ascending")
    if not set(m.scales) <= set(SCALES) or any(a != 2 * b for a, b in itertools.pairwise(m.scales)):
        refuse("scales", f"some of {SCALES}, in this order and each half of the one before")
    if not 0 <= len(m.anchor_sizes) - len(m.scales) <= 1:
        refuse("anchor_sizes", f"{len(m.scales)} sizes, one for each of method.scales, or one more")
    if m.pyramid == "blocks" and len(m.map_blocks) != len(m.scales):
        refuse("map_blocks", f"{len(m.scales)} blocks, one for each of method.scales")
    if m.pyramid == "blocks" and m.map_blocks[-1] != depth - 1:
        refuse("map_blocks", f"the last block, {depth - 1}, among them: blocks after it would not be trained")
    if len(m.stage_overlaps) not in (1, 3) or len(m.stage_weights) != len(m.stage_overlaps):
        refuse("stage_overlaps", "one stage, or the three of a cascade, and as many method.stage_weights as stages")
    if m.class_token and (m.window or m.relative_positions):
        refuse("class_token", "False: it has no place in windows and relative positions")
    _check_grid(config, PatchGrid.of(config))


def _check_grid(config: ConfigDict, grid: PatchGrid) -> None:
    m = config.method
    if grid.patch_height != grid.patch_width:
        raise UserError(f"model.patch={config.model.patch}; the anchors of method.name=detection need square patches")
    if 0.5 in m.scales and (grid.rows % 2 or grid.columns % 2):
        raise UserError(f"data.image_size={config.data.image_size} is {grid.rows} x {grid.columns} patches; a map at "
                        "half of that needs even numbers")
    if m.window and max(grid.shape) >= 2**12:
        raise UserError(f"data.image_size={config.data.image_size} has too many patches for windows")


def learns(trained: int, depth: int, path: str) -> bool:
    """Returns whether the parameter at a path is trained, by config.method.train_blocks."""
    block = re.match(r"encoder/block_(\d+)/", path)
    return trained < 0 or not path.startswith("encoder/") or bool(block and int(block[1]) >= depth - trained)


def decays(which: str, path: str) -> bool:
    """Returns whether weight decay applies to the parameter at a path, by config.method.decayed.

    'detectron2': its default parameter groups exclude torch's normalization layers, and ViTDet's exclude the positions.
    Detectron2's own layer norms of maps are not excluded, so that all parameters of pyramid and heads, and all biases,
    decay. 'matrices' is as iBOT's optimizer decays, tables of relative positions apart, which its encoder lacks.
    """
    last = path.rsplit("/", 1)[-1]
    if which == "all":
        return True
    if which == "kernels":
        return last in ("kernel", "cls_token")
    if which == "matrices":
        return last in ("kernel", "cls_token", "pos_embed")
    return last != "pos_embed" and not re.search(r"^encoder/.*norm\d?/", path)


def flops(method: Any) -> int:
    """Returns the FLOPs of the forward pass of one image in training: matrix products, 2 FLOPs per multiply-add.

    RoIAlign is not counted, since it has matrix products in some implementations only (not on CPUs); the decomposed
    relative positions are not counted either.
    """
    m, model, grid = method.config.method, method.config.model, method.grid
    patches, width, channels = grid.num_patches, model.width, m.channels
    total = 2 * patches * grid.patch_dim * width
    for block in range(model.depth):
        windows = 1 if not m.window or block in m.global_blocks else int(np.prod(
            [-(-side // m.window) for side in grid.shape]))
        tokens = m.window**2 if windows > 1 else patches
        total += windows * blocks_flops(tokens, width, 1, model.mlp_ratio)
    anchors, narrow = len(m.anchor_ratios), m.pyramid == "simple"
    for scale in m.scales:
        inputs = width
        for number in range(int(np.log2(max(scale, 1)))):
            outputs = inputs // 2 if narrow else inputs
            total += conv_flops(patches * 4**number, 1, inputs, 4 * outputs)
            inputs = outputs
        cells = patches * scale**2
        total += conv_flops(cells, 1, inputs, channels) + conv_flops(cells, 3, channels, channels)
        total += m.proposal_convs * conv_flops(cells, 3, channels, channels)
        total += conv_flops(cells, 1, channels, 5 * anchors)
    flat = BOX_SIDE**2 * channels
    layers = [flat, *[m.box_width] * m.box_layers]
    head = m.box_convs * conv_flops(BOX_SIDE**2, 3, channels, channels) + sum(
        conv_flops(1, 1, a, b) for a, b in itertools.pairwise(layers))
    head += conv_flops(1, 1, layers[-1], method.classes + 1 + 4 * (method.classes if m.class_boxes else 1))
    total += len(m.stage_overlaps) * m.regions * head
    cells = MASK_SIDE**2
    masks = m.mask_convs * conv_flops(cells, 3, channels, channels) + conv_flops(cells, 1, channels, 4 * channels)
    return total + method.positives * (masks + conv_flops(4 * cells, 1, channels, method.classes))
