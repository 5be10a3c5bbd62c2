"""Writes detection.npz: what torchvision makes of boxes, anchors, matches, RoIAlign, masks and losses.

  python tests/golden/make_detection.py      (needs torchvision; its readers do not)
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torchvision would compile its RoIAlign, for minutes

import numpy as np
import torch
from torch.nn import functional

# A torchvision built for CUDA imports on a CPU build of torch once these are declared; nothing here uses them.
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for missing in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, missing):
        LIBRARY.define(f"{missing}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torchvision import ops  # noqa: E402
from torchvision.models.detection import _utils as utils  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.image_list import ImageList  # noqa: E402
from torchvision.models.detection.roi_heads import (  # noqa: E402
    fastrcnn_loss,
    maskrcnn_loss,
    project_masks_on_boxes,
)
from torchvision.models.detection.rpn import RegionProposalNetwork  # noqa: E402

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
SIDES = {7: (2, 1, -1), 14: (2,)}  # bins → samples per bin and axis; -1: adaptive


def boxes(draws: np.random.Generator, count: int, side: float) -> np.ndarray:
    """Returns boxes inside an image, small and large, square and long."""
    size = np.exp(draws.uniform(np.log(2), np.log(side), (count, 2)))
    start = draws.uniform(0, 1, (count, 2)) * (side - size)
    return np.float32(np.concatenate([start, start + size], -1))


def matches(draws: np.random.Generator) -> dict[str, np.ndarray]:
    objects, proposals = boxes(draws, 6, 96), boxes(draws, 300, 96)
    proposals[:3] = objects[0]  # of equal overlap
    overlap = ops.box_iou(torch.tensor(objects), torch.tensor(proposals))
    found = {"match/objects": objects, "match/proposals": proposals, "match/iou": overlap.numpy(),
             "match/giou": ops.generalized_box_iou(torch.tensor(objects), torch.tensor(proposals)).numpy()}
    for name, (high, low, quality) in {"rpn": (0.7, 0.3, True), "roi": (0.5, 0.5, False)}.items():
        found[f"match/{name}"] = utils.Matcher(high, low, allow_low_quality_matches=quality)(overlap).numpy()
    return found


def coded(draws: np.random.Generator) -> dict[str, np.ndarray]:
    coder = utils.BoxCoder(WEIGHTS)
    targets, proposals = boxes(draws, 40, 96), boxes(draws, 40, 96)
    deltas = np.float32(draws.normal(0, 3, (40, 4)) * WEIGHTS)
    return {"coder/targets": targets, "coder/proposals": proposals, "coder/deltas": deltas,
            "coder/encoded": coder.encode_single(torch.tensor(targets), torch.tensor(proposals)).numpy(),
            "coder/decoded": coder.decode_single(torch.tensor(deltas), torch.tensor(proposals)).numpy()}


def anchors() -> dict[str, np.ndarray]:
    generator = AnchorGenerator(((32,), (64,)), ((0.5, 1.0, 2.0),) * 2)
    # Theirs are rounded; the cells are given here as they are before that, in float64.
    ratios = np.array([0.5, 1.0, 2.0])
    generator.cell_anchors = [
        torch.tensor(np.stack([-s / ratios**0.5, -s * ratios**0.5, s / ratios**0.5, s * ratios**0.5], 1) / 2).float()
        for s in (32, 64)]
    maps = [torch.zeros(1, 1, 12, 16), torch.zeros(1, 1, 6, 8)]
    found = generator(ImageList(torch.zeros(1, 3, 48, 64), [(48, 64)]), maps)[0].numpy()
    return {"anchors": found}


def aligned(draws: np.random.Generator) -> dict[str, np.ndarray]:
    strides, image = (4, 8), 96
    found: dict[str, np.ndarray] = {"align/boxes": boxes(draws, 24, image)}
    maps = [np.float32(draws.standard_normal((1, 3, image // stride, image // stride))) for stride in strides]
    rois = [torch.tensor(found["align/boxes"])]
    for number, (stride, values) in enumerate(zip(strides, maps, strict=True)):
        found[f"align/map/{number}"] = values.transpose(0, 2, 3, 1)
        for side, samples in SIDES.items():
            for count in samples:
                features = ops.roi_align(torch.tensor(values), rois, side, 1 / stride, count, aligned=True)
                found[f"align/{number}/{side}/{max(count, 0)}"] = features.numpy().transpose(0, 2, 3, 1)
    values = torch.tensor(maps[0], requires_grad=True)
    ops.roi_align(values, rois, 7, 1 / strides[0], 2, aligned=True).square().sum().backward()
    found["align/gradient"] = values.grad.numpy().transpose(0, 2, 3, 1)
    return found


def masks(draws: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns bitmaps of ellipses, what Detectron2 trains for, and probabilities pasted as it does."""
    image, count = 96, 5
    place = boxes(draws, count, image).round()
    place[:, 2:] = np.maximum(place[:, 2:], place[:, :2] + 12).clip(max=image)
    place[:, :2] = np.minimum(place[:, :2], place[:, 2:] - 12)
    center, half = (place[:, :2] + place[:, 2:]) / 2, (place[:, 2:] - place[:, :2]) / 2
    y, x = np.mgrid[:image, :image] + 0.5
    away = [(at - middle[:, None, None]) / reach[:, None, None]
            for at, middle, reach in zip((x, y), center.T, half.T, strict=True)]
    bitmaps = away[0]**2 + away[1]**2 <= 1
    proposals = np.float32((place + draws.uniform(-3, 3, (count, 4))).clip(0, image))
    rois = torch.cat([torch.arange(count)[:, None], torch.tensor(proposals)], 1)
    mean = ops.roi_align(torch.tensor(np.float32(bitmaps))[:, None], rois, 28, 1.0, -1, aligned=True)[:, 0].numpy()
    probabilities = np.float32(draws.uniform(0, 1, (count, 14, 14)))
    y, x = (torch.arange(image) + 0.5 for _ in range(2))
    pasted = []
    for mask, (x1, y1, x2, y2) in zip(probabilities, proposals, strict=True):
        across, down = (x - x1) / (x2 - x1) * 2 - 1, (y - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1)
        pasted.append(functional.grid_sample(torch.tensor(mask)[None, None], grid[None], align_corners=False)[0, 0])
    return {"masks/boxes": np.float32(place), "masks/bitmaps": np.packbits(bitmaps, -1), "masks/proposals": proposals,
            "masks/mean": mean, "masks/probabilities": probabilities, "masks/pasted": np.float16(torch.stack(pasted))}


def losses(draws: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns sampled boxes of two images, what a model makes of them, and torchvision's losses."""
    shape, classes, side = (2, 12), 3, 7
    kind = np.int32([[1] * 5 + [0] * 7, [1] * 3 + [0] * 6 + [-1] * 3])
    label = draws.integers(classes, size=shape).astype(np.int32)
    logits, objectness = (np.float32(draws.normal(0, 2, (*shape, *last))) for last in ((classes + 1,), ()))
    deltas = np.float32(draws.normal(0, 1, (*shape, classes, 4)))
    # For errors above beta = 1 / 9, as those of regions are here, smooth L1 is L1 less beta / 2.
    away = draws.choice([-1, 1], (*shape, 4)) * draws.uniform(0.2, 2, (*shape, 4))
    targets = np.float32(np.take_along_axis(deltas, label[..., None, None], 2)[:, :, 0] + away)
    proposal_deltas = np.float32(targets + draws.normal(0, 0.2, (*shape, 4)))
    mask_logits = np.float32(draws.normal(0, 2, (*shape, side, side, classes)))
    used, positive = kind.reshape(-1) >= 0, kind.reshape(-1) == 1
    torch_label = torch.tensor(label.reshape(-1) + 1).long()

    def flat(values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values.reshape(-1, *values.shape[2:]))

    network = SimpleNamespace(fg_bg_sampler=lambda _: [[torch.tensor(each == which) for each in kind]
                                                       for which in (1, 0)])
    of_proposals = RegionProposalNetwork.compute_loss(
        network, flat(objectness), flat(proposal_deltas), [torch.tensor(np.float32(each)) for each in kind],
        [torch.tensor(each) for each in targets])
    # The background is the proposal_deltas class there, the last one here.
    of_regions = fastrcnn_loss(
        flat(np.roll(logits, 1, -1))[used], flat(np.pad(deltas, ((0, 0), (0, 0), (1, 0), (0, 0))))[used].flatten(1),
        [torch.where(torch.tensor(positive), torch_label, 0)[used]], [flat(targets)[used]])
    bitmaps, place = torch.tensor(draws.random((24, 96, 96)) < 0.5).float(), torch.tensor(boxes(draws, 24, 96))
    own = torch.arange(24)
    of_masks = maskrcnn_loss(
        flat(np.pad(mask_logits, ((0, 0),) * 4 + ((1, 0),))).permute(0, 3, 1, 2)[positive], [place[positive]],
        [bitmaps], [torch_label], [own[positive]])
    pairs = np.stack([boxes(draws, 24, 96), boxes(draws, 24, 96)])
    found = {"kind": kind, "label": label, "logits": logits, "objectness": objectness, "deltas": deltas,
             "targets": targets, "proposal_deltas": proposal_deltas, "mask_logits": mask_logits, "pairs": pairs,
             "mask_targets": project_masks_on_boxes(bitmaps, place, own, side).numpy().reshape(*shape, side, side),
             "of_proposals": np.stack(of_proposals), "of_regions": np.stack(of_regions), "of_masks": of_masks.numpy(),
             "of_pairs": ops.generalized_box_iou_loss(*torch.tensor(pairs)).numpy()}
    return {f"loss/{name}": value for name, value in found.items()}


def main() -> None:
    draws = np.random.default_rng(0)
    arrays = matches(draws) | coded(draws) | anchors() | aligned(draws) | masks(draws) | losses(draws)
    np.savez_compressed(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "detection.npz"), **arrays)


if __name__ == "__main__":
    main()
