"""Writes detector.npz: what Hugging Face's VitDetBackbone, and a pyramid and a mask head in torch, make of an image.

  python tests/golden/make_detector.py      (needs torch and transformers; the tests that read the file need neither)

The grid is 7 x 7, which windows of 3 do not divide; positions are those of 4 x 4, resized. All is in float64, so that
the file is the truth to float32's last digit, and all weights are random: a zero would hide a wrong place.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import VitDetBackbone, VitDetConfig

WIDTH, CHANNELS, CLASSES = 24, 16, 3
CONFIG = {
    "hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 3, "mlp_ratio": 4, "patch_size": 4,
    "image_size": 28, "pretrain_image_size": 16, "window_size": 3, "window_block_indices": [0, 2], "hidden_act": "gelu",
    "residual_block_indices": [], "use_relative_position_embeddings": True, "layer_norm_eps": 1e-6,
}


class LayerNorm(nn.Module):
    """A layer norm over the channels of each cell of [B, C, H, W], as Detectron2's."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], self.weight, self.bias, 1e-6
                                        ).permute(0, 3, 1, 2)


def level(scale: float) -> nn.Sequential:
    """Returns one map of ViTDet's simple pyramid (its SimpleFeaturePyramid)."""
    parts: list[nn.Module] = {
        4: [nn.ConvTranspose2d(WIDTH, WIDTH // 2, 2, 2), LayerNorm(WIDTH // 2), nn.GELU(),
            nn.ConvTranspose2d(WIDTH // 2, WIDTH // 4, 2, 2)],
        2: [nn.ConvTranspose2d(WIDTH, WIDTH // 2, 2, 2)], 1: []}[scale]
    width = {4: WIDTH // 4, 2: WIDTH // 2, 1: WIDTH}[scale]
    return nn.Sequential(*parts, nn.Conv2d(width, CHANNELS, 1, bias=False), LayerNorm(CHANNELS),
                         nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), LayerNorm(CHANNELS))


def mask_head() -> nn.Sequential:
    """Returns Detectron2's MaskRCNNConvUpsampleHead of two convolutions."""
    convs = [part for _ in range(2) for part in (
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), LayerNorm(CHANNELS), nn.ReLU())]
    return nn.Sequential(*convs, nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2), nn.ReLU(),
                         nn.Conv2d(CHANNELS, CLASSES, 1))


def with_random_weights(module: nn.Module, draws: np.random.Generator) -> dict[str, np.ndarray]:
    """Fills a module, in float64, and returns name → float32."""
    found = {}
    module.double().eval()
    for name, parameter in module.named_parameters():
        values = draws.standard_normal(parameter.shape)
        values = values * 0.3 + name.endswith("weight") if parameter.dim() == 1 else values * (
            0.3 if "pos" in name else np.prod(parameter.shape[1:]) ** -0.5)
        found[name] = values.astype(np.float32)
        parameter.data = torch.tensor(found[name]).double()
    return found


def main() -> None:
    draws = np.random.default_rng(0)
    backbone, levels, masks = VitDetBackbone(VitDetConfig(**CONFIG)), [level(s) for s in (4, 2, 1)], mask_head()
    arrays = {f"backbone/{name}": leaf for name, leaf in with_random_weights(backbone, draws).items()}
    pixels = draws.standard_normal((2, 3, 28, 28)).astype(np.float32)
    with torch.no_grad():
        features = backbone(torch.tensor(pixels).double()).feature_maps[0]
        arrays |= {"pixels": pixels.transpose(0, 2, 3, 1), "map": features.permute(0, 2, 3, 1).numpy()}
        for number, module in enumerate(levels):
            arrays |= {f"level{number}/{name}": leaf for name, leaf in with_random_weights(module, draws).items()}
            arrays[f"pyramid/{number}"] = module(features).permute(0, 2, 3, 1).numpy()
        arrays |= {f"masks/{name}": leaf for name, leaf in with_random_weights(masks, draws).items()}
        regions = draws.standard_normal((3, CHANNELS, 5, 5)).astype(np.float32)
        arrays |= {"regions": regions.transpose(0, 2, 3, 1),
                   "logits": masks(torch.tensor(regions).double()).permute(0, 2, 3, 1).numpy()}
    small = {name: leaf.astype(np.float32) for name, leaf in arrays.items()}
    np.savez_compressed(Path(__file__).parent / "detector.npz", **small)


if __name__ == "__main__":
    main()
