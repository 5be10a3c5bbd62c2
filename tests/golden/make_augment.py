"""Writes augment.npz: what torchvision and timm make of two real images, with stated parameters.

  python tests/golden/make_augment.py      (needs torchvision, timm and scikit-image; its readers do not)

Keys: 'picture/<name>' is a crop of a photograph; '<name>/<operation>/<parameter>' what the operation makes of it. The
parameter of a RandAugment operation is its amount: the magnitude over 10, with the sign of its direction.
"""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

# A torchvision built for CUDA imports on a CPU build of torch once these are declared; nothing here uses them.
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for missing in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, missing):
        LIBRARY.define(f"{missing}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from timm.data import auto_augment as timm_ops  # noqa: E402
from torchvision.transforms import InterpolationMode  # noqa: E402
from torchvision.transforms import functional as vision  # noqa: E402
from torchvision.transforms import transforms as vision_transforms  # noqa: E402

PICTURES = {"astronaut": (40, 200, 32, 24), "chelsea": (90, 120, 24, 32)}  # top, left, height, width at half size
SIMPLE = ((16, 0, 0), (16, 3, 8), (16, 8, 8))  # side, top, left in the padded image
TIMM = {
    "auto_contrast": ("AutoContrast", (0.9,)), "equalize": ("Equalize", (0.9,)), "invert": ("Invert", (0.9,)),
    "rotate": ("Rotate", (0.9, -0.83)), "posterize": ("PosterizeIncreasing", (0.7, 0.9)),
    "solarize": ("SolarizeIncreasing", (0.87, 0.45)), "solarize_add": ("SolarizeAdd", (0.9, 0.4)),
    "color": ("ColorIncreasing", (0.9, -0.95)), "contrast": ("ContrastIncreasing", (0.9, -0.95)),
    "brightness": ("BrightnessIncreasing", (0.8, -1.0)), "sharpness": ("SharpnessIncreasing", (0.9, -0.9)),
    "shear_x": ("ShearX", (0.9, -0.85)), "shear_y": ("ShearY", (0.9, -0.85)),
    "translate_x": ("TranslateXRel", (0.9, -0.3)), "translate_y": ("TranslateYRel", (0.9, -0.3)),
}


def photograph(name: str) -> Image.Image:
    """Cuts a small crop out of a photograph of scikit-image."""
    folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    image = Image.open(folder / f"{name}.png").convert("RGB").reduce(2)
    top, left, height, width = PICTURES[name]
    return image.crop((left, top, left + width, top + height))


def of_torchvision(image: Image.Image) -> dict[str, Image.Image]:
    """Returns '<operation>/<parameter>' → result."""
    adjust = {"brightness": vision.adjust_brightness, "contrast": vision.adjust_contrast,
              "saturation": vision.adjust_saturation}
    made = {f"adjust_{name}/{amount}": change(image, 1 + amount)
            for name, change in adjust.items() for amount in (-0.3, 0.25)}
    made |= {f"adjust_hue/{turn}": vision.adjust_hue(image, turn) for turn in (-0.1, 0.07)}
    made["grey/0"] = vision.to_grayscale(image, 3)
    made["solarise/128"] = vision.solarize(image, 128)
    for side, top, left in SIMPLE:
        padded = vision.pad(vision.resize(image, side, InterpolationMode.BICUBIC), 4, padding_mode="reflect")
        with mock.patch.object(vision_transforms.RandomCrop, "get_params",
                               return_value=(top, left, side, side)):
            again = vision_transforms.RandomCrop(side, padding=4, padding_mode="reflect")
            made[f"simple/{side}-{top}-{left}"] = again(vision.resize(image, side, InterpolationMode.BICUBIC))
        assert made[f"simple/{side}-{top}-{left}"].tobytes() == vision.crop(padded, top, left, side, side).tobytes()
    return made


def of_timm(image: Image.Image) -> dict[str, Image.Image]:
    """Returns '<operation>/<amount>' → result, timm's own policy deciding what a magnitude means."""
    policy = timm_ops.rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC})
    by_name = {operation.name: operation for operation in policy.ops}
    assert sorted(by_name) == sorted(name for name, _ in TIMM.values())
    made = {}
    for name, (theirs, amounts) in TIMM.items():
        operation = by_name[theirs]
        operation.prob, operation.magnitude_std = 1.0, 0
        for amount in amounts:
            operation.magnitude, side_of_half = 10 * abs(amount), float(amount < 0)  # timm negates what is above a half
            with mock.patch("random.random", return_value=side_of_half):
                made[f"{name}/{amount}"] = operation(image)
    return made


def main() -> None:
    arrays = {}
    for name in PICTURES:
        image = photograph(name)
        arrays[f"picture/{name}"] = np.asarray(image)
        made = of_torchvision(image) | {f"timm_{key}": value for key, value in of_timm(image).items()}
        arrays |= {f"{name}/{key}": np.asarray(value) for key, value in made.items()}
    np.savez_compressed(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "augment.npz"), **arrays)


if __name__ == "__main__":
    main()
