r"""DeiT III: supervised training of plain ViTs (arXiv 2204.07118), as in facebookresearch/deit (README_revenge.md).

  python -m mae_jax.main --config=configs/deit3.py:B --workdir=gs://BUCKET/deit3_b \
      --config.data.path=gs://BUCKET/tensorflow_datasets
  python -m mae_jax.main --config=configs/deit3.py:B,to224 --workdir=gs://BUCKET/deit3_b_224 \
      --config.init_from=gs://BUCKET/deit3_b --config.data.path=gs://BUCKET/tensorflow_datasets

  python -m mae_jax.main --config=configs/deit3.py:B,in21k --workdir=gs://BUCKET/deit3_b_21k \
      --config.data.path='gs://BUCKET/imagenet21k/{split}-*.tfrecord'
  python -m mae_jax.main --config=configs/deit3.py:B,in21k_to_1k --workdir=gs://BUCKET/deit3_b_21k_1k \
      --config.init_from=gs://BUCKET/deit3_b_21k --config.data.path=gs://BUCKET/tensorflow_datasets

Arguments, separated by commas: a size, one stage, `runlocal` (two small steps on a laptop). Sizes: `S`, `B` (the
default), `L` (ViT/16), `H` (ViT-H/14), `H52` (52 blocks, otherwise as H: "no new hyper-parameters"). Stages:

  `800`          (the default) ImageNet-1K from scratch, 800 epochs; S at 224 pixels, B and L at 192, H at 154
  `400`          the same for 400 epochs, with less weight decay and stochastic depth
  `to224`        20 more epochs at 224 pixels: B, L, H
  `to384`        20 more epochs at 384 pixels: S, B, L
  `in21k`        ImageNet-21K from scratch: S, B, L 240 epochs at 224 pixels, H 90 epochs at 126
  `in21k_to_1k`  50 epochs of ImageNet-1K at 224 pixels after `in21k`, with a new head

Expected (published figures, not reproduced here; ImageNet-1K top-1, S / B / L / H):
  `800`                at its own resolution 81.38 / 82.82 / 84.02 / 83.48
  `800`, `to224`       81.4 / 83.8 / 84.9 / 85.2, ImageNet-V2 70.5 / 73.6 / 75.1 / 75.9; H52 84.9 in all
  `800`, ..., `to384`  83.4 / 85.0 / 85.8, ImageNet-V2 73.1 / 74.8 / 76.7
  `400`, `to224`       80.4 / 83.5 / 84.5 / 85.1
  `in21k_to_1k`        83.1 / 85.7 / 87.0 / 87.2, ImageNet-V2 73.8 / 76.5 / 78.6 / 79.2
ImageNet-V2 is read once, at the end, with --config.eval.sets="('imagenet_v2',)".

Differences from the released code, and between sources:
- H: the released code uses 160 pixels, which are 11 patches of 14 and 6 unused pixels, and 128, which are 9 and 2. Here
  images are resized to the 154 and 126 pixels that are used, as in affjljoo3581/deit3-jax, which reached 85.1 in 400
  epochs.
- `400` is not in the README. Its values are those of deit3-jax (weight decay 0.02, stochastic depth
  0.0 / 0.1 / 0.4 / 0.5), which reached 80.7 / 83.6 / 84.6 / 85.1; naver-ai/rope-vit has 0.03 and the same stochastic
  depth, without H. In `to224` after it, deit3-jax keeps this stochastic depth (--config.model.drop_path=0.1 for B);
  rope-vit has the values used here. Table 1 of the paper (learning rate 3e-3 for all, weight decay 0.02) is not the
  final recipe.
- The released script averages parameters (0.99996 per step) by default, but the figures above are those of the last
  weights: eval/raw/top1 here, where eval/top1 is the average's. The next stage starts from the average; with
  --config.optim.ema=0, it starts from the last weights, as in the released code. The short stages do not average: after
  their few steps, an eighth or more of the average would still be the initial weights.
- The learning rate of the released code changes once per epoch, and one epoch late; here it changes with every step.
- LAMB clips gradients to the norm 1, as the released code's optimizer does internally (FusedLAMB).
- ImageNet-21K is not in TFDS: use TFRecords with image and label, or --config.data.source=folder for class folders.
  No part of it is held out; --config.data.eval_split=test holds out the last tenth, for patterns without {split}.
- Batches of 4096 on ImageNet-21K: --config.batch_size=4096 --config.optim.lr=9.375e-5, the released code's 1.5e-3.
"""

from functools import partial

from ml_collections import ConfigDict

from mae_jax.config import default, resolve, vit
from mae_jax.errors import UserError

S, B, L, H = 384, 768, 1024, 1280  # widths, which are the keys of the tables: H52 has the values of H
IMAGENET = "imagenet2012:5.*.*"

LR = {S: 4e-3, B: 3e-3, L: 3e-3, H: 3e-3}  # for a batch of 2048
SIDE = {S: 224, B: 192, L: 192, H: 154}  # pixels
WEIGHT_DECAY = {"800": 0.05, "400": 0.02}
DROP_PATH = {  # stage → width → rate of every block; missing sizes are not published
    "800": {S: 0.05, B: 0.2, L: 0.45, H: 0.6},
    "400": {S: 0.0, B: 0.1, L: 0.4, H: 0.5},
    "to224": {B: 0.2, L: 0.45, H: 0.55},
    "to384": {S: 0.0, B: 0.15, L: 0.4},
    "in21k": {S: 0.05, B: 0.1, L: 0.3, H: 0.5},
    "in21k_to_1k": {S: 0.05, B: 0.15, L: 0.4, H: 0.45},
}


def get_config(arg: str = "") -> ConfigDict:
    config = default("supervised")
    config.data.update(source="tfds", name=IMAGENET, eval_split="validation", crop_scale=(0.08, 1.0))
    config.eval.crop_ratio = (1.0,)
    config.model.update(positions="random", init="normal", layer_scale=1e-4, drop_path_rates="constant")
    config.method.update(head_std=0.02, cutmix=1.0)
    config.optim.update(betas=(0.9, 0.999), warmup="5 epochs", warmup_lr=1e-6, min_lr=1e-5)
    size(config, "B")
    sizes = {name: partial(size, name=name) for name in ("S", "B", "L", "H", "H52")}
    stages = {"800": pretrain, "400": pretrain, "to224": finetune, "to384": finetune, "in21k": in21k,
              "in21k_to_1k": in21k_to_1k}
    return resolve(config, arg, sizes, {name: partial(change, stage=name) for name, change in stages.items()})


def size(config: ConfigDict, name: str) -> None:
    """Sets the encoder's size, and the stage `800` for it."""
    config.model.update(vit(name[0], patch=14 if name[0] == "H" else 16))
    if name == "H52":
        config.model.depth = 52
    pretrain(config, "800")


def regularize(config: ConfigDict, stage: str, weight_decay: float) -> None:
    """Sets stochastic depth and weight decay; raises UserError for a size for which the stage is not published."""
    rates = DROP_PATH[stage]
    if config.model.width not in rates:
        names = ", ".join(name for name, width in {"S": S, "B": B, "L": L, "H": H}.items() if width in rates)
        raise UserError(f"configs/deit3.py: the stage {stage!r} is published for the sizes {names}")
    config.model.drop_path = rates[config.model.width]
    config.optim.weight_decay = weight_decay


def lamb(config: ConfigDict, lr: float) -> None:
    """Sets LAMB with batches of 2048; `lr` is for this batch, not per 256 images."""
    config.batch_size = 2048
    config.optim.update(name="lamb", lr=lr * 256 / 2048, clip=1.0)


def square(config: ConfigDict, side: int) -> None:
    config.data.image_size = (side, side)


def pretrain(config: ConfigDict, stage: str) -> None:
    """Trains on ImageNet-1K from scratch: binary cross-entropy, 3-Augment, each image three times in a batch."""
    square(config, SIDE[config.model.width])
    config.data.update(color="three", repeats=3)
    config.method.update(loss="bce", mixup=0.8)
    lamb(config, LR[config.model.width])
    config.optim.ema = 0.99996
    config.train.duration = f"{stage} epochs"
    regularize(config, stage, WEIGHT_DECAY[stage])


def cross_entropy(config: ConfigDict, mixup: float) -> None:
    """Sets what all other stages have in common."""
    config.data.repeats = 1
    config.method.update(loss="cross_entropy", smoothing=0.1, mixup=mixup)


def finetune(config: ConfigDict, stage: str) -> None:
    """Trains more epochs at the final resolution: AdamW, RandAugment in place of 3-Augment."""
    square(config, int(stage.removeprefix("to")))
    cross_entropy(config, mixup=0.8)
    config.batch_size = 512
    config.data.color = "rand"
    # The learning rate is constant: the released code's minimum, 1e-5 by default, equals its maximum here.
    config.optim.update(name="adamw", lr=1e-5 * 256 / 512, clip=0.0, ema=0.0)
    config.train.duration = "20 epochs"
    config.checkpoint.every = config.eval.every = "5 epochs"
    regularize(config, stage, weight_decay=0.1)


def in21k(config: ConfigDict, stage: str) -> None:
    """Trains on ImageNet-21K from scratch: simple random crop, cross-entropy, cutmix without mixup."""
    huge = config.model.width == H
    square(config, 126 if huge else 224)
    cross_entropy(config, mixup=0.0)
    config.data.update(source="tfrecord", name="", eval_split="", augment="simple")
    lamb(config, 1e-3)
    config.train.duration = "90 epochs" if huge else "240 epochs"
    regularize(config, stage, weight_decay=0.02)


def in21k_to_1k(config: ConfigDict, stage: str) -> None:
    """Trains on ImageNet-1K after ImageNet-21K: the same at a lower learning rate."""
    square(config, 224)
    cross_entropy(config, mixup=0.0)
    config.data.augment = "simple"
    lamb(config, 3e-4)
    config.optim.ema = 0.0
    config.train.duration = "50 epochs"
    config.checkpoint.every = config.eval.every = "5 epochs"
    regularize(config, stage, weight_decay=0.02)
