"""Writes timm.npz: what timm's VisionTransformer computes with tiny random weights, and what its Mixup does.

  python tests/golden/make_timm.py      (needs torch and timm; the tests that read the file need neither)

Models: one as DeiT III's (LayerScale, positions for the patches alone, the class token is classified), and a plain ViT
whose positions include the class token's and which classifies the normalized mean of the patch tokens. All weights are
random: a zero or a one would hide a wrong place. They compute in float64.

Mixup and cutmix have their λ and the middle of the box given. λ is such that the box has even sides: odd ones lose a
pixel in timm 0.3.2, which MAE and DeiT III use, and in ours, but not in later versions.
"""

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from timm.data import mixup
from timm.models import VisionTransformer

SHAPE = {"img_size": (24, 32), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
CASES = {
    "deit3": {"no_embed_class": True, "init_values": 1e-6, "global_pool": "token"},
    "average": {"global_pool": "avg"},
}
IMAGES = 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MIXES = {  # λ, the middle of the box (row, column) or None for mixup, smoothing
    "mixup": (0.3, None, 0.1),
    "inside": (0.75, (8, 12), 0.1),
    "corner": (0.15, (0, 23), 0.0),
    "bottom": (0.4, (15, 3), 0.1),
}
CLASSES = 4


def random_weights(model: VisionTransformer, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns name → float32; LayerScale's factors, as norm scales, lie around one."""
    weights = {}
    for name, parameter in model.named_parameters():
        values = rng.standard_normal(parameter.shape)
        if parameter.dim() == 1:
            values = 0.3 * values + name.endswith(("weight", "gamma"))
        elif parameter.dim() != 3:
            values /= np.sqrt(np.prod(parameter.shape[1:]))
        weights[name] = values.astype(np.float32)
    return weights


def run_model(case: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    model = VisionTransformer(**SHAPE, **case).double().eval()
    weights = random_weights(model, rng)
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    pictures = rng.integers(0, 256, (IMAGES, *SHAPE["img_size"], 3), np.uint8)
    with torch.no_grad():
        logits = model(torch.from_numpy((pictures / 255 - MEAN) / STD).permute(0, 3, 1, 2))
    return {"pictures": pictures, "logits": logits.numpy(), **{f"weight/{name}": w for name, w in weights.items()}}


def run_mix(lam: float, middle: tuple[int, int] | None, smoothing: float,
            rng: np.random.Generator) -> dict[str, np.ndarray]:
    pictures = rng.integers(0, 256, (4, 16, 24, 3)).astype(np.float32)  # whole numbers, for a small file
    label = rng.integers(0, CLASSES, 4)
    mixer = mixup.Mixup(1.0, 1.0, label_smoothing=smoothing, num_classes=CLASSES)
    mixer._params_per_batch = lambda: (lam, middle is not None)
    with mock.patch.object(mixup.np.random, "randint", side_effect=middle):
        mixed, target = mixer(torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2), torch.from_numpy(label))
    return {"pictures": pictures, "label": label.astype(np.int32), "mixed": mixed.permute(0, 2, 3, 1).numpy(),
            "target": target.numpy(), "lam": np.float32(lam), "smoothing": np.float32(smoothing),
            "middle": np.array(middle or (), np.int32)}


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, case in CASES.items():
        arrays |= {f"{name}/{key}": values for key, values in run_model(case, rng).items()}
    for name, case in MIXES.items():
        arrays |= {f"mix/{name}/{key}": values for key, values in run_mix(*case, rng).items()}
    np.savez_compressed(Path(__file__).with_name("timm.npz"), **arrays)


if __name__ == "__main__":
    main()
