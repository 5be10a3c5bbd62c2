r"""Semantic segmentation by UperNet with fine-tuning of the encoder, in the protocols of papers' ADE20K results.

  python -m mae_jax.main --config=configs/upernet.py --workdir=runs/upernet --config.init_from=runs/mine \
      --config.data.path=ADEChallengeData2016/images --config.data.mask_key=ADEChallengeData2016/annotations

Figures of different protocols are not comparable; state the protocol with the figure. All protocols train 160,000 steps
of 16 images of 512 x 512, which are 127 epochs. The encoder has the shape of that of `init_from`; the other values are
those of ViT-B for any size. The papers report eval/own_size/miou, at the annotations' own size. No published figure has
been reproduced with these recipes.

The protocol, one of them:
  mae        the default: MAE's, as in its reproduction (implus/mae_segmentation). Adds relative position biases and a
             LayerScale of 1 to the encoder; evaluation in windows of 512 with stride 341. ViT-B: mIoU 48.15 there, 48.1
             in the paper (1,600 epochs of pre-training)
  beit       BEiT's after self-supervision (microsoft/unilm). Relative position biases, the encoder's own LayerScale;
             the same windows. ViT-B: 47.1, by MAE's Table 5
  ibot       iBOT's, which we assume MixedAE and MoCE use. The encoder's norm on its four maps, the same windows. iBOT
             ViT-B: 50.0
  xcit       XCiT's (facebookresearch/xcit), which we assume DeiT III and SplitMask use. A narrower head, no layer
             decay, evaluation on whole images. DeiT III ViT-B: 50.2, SplitMask ViT-B: 45.7, both from memory and not
             checked

The data, one of them:
  ade20k     the default: the 150 classes, the authors' ADEChallengeData2016.zip unpacked (docs/segmentation.md).
             For your own folders, set --config.data.name= --config.method.classes=... and, if 0 is a class,
             --config.data.mask_offset=0
  mosaic     parts of photographs that need no download, and the small encoder of folder:laptop. Minutes on a
             laptop; all values are our choice
  held       trains on nine tenths of the training data and evaluates on the rest instead of the test data
  runlocal   two small steps of any of them, on mosaics

Values that a paper or its code states are as stated. Our choice: weight decay (on kernels, class token and tables of
biases; BEiT's code excludes parameters with one axis), batch norm over the global batch, and image resizing (Pillow's
antialiased bicubic filter). The loss is the mean over the pixels with a class; mmsegmentation divides by all pixels.
"""

from ml_collections import ConfigDict

from mae_jax import presets
from mae_jax.config import default, resolve, vit

SHAPE = ("width", "depth", "heads", "patch", "mlp_ratio", "gelu")  # fields that init_from's encoder sets
BATCH = 16


def get_config(arg: str = "") -> ConfigDict:
    config = default("segment")
    config.batch_size = BATCH
    config.data.update(image_size=(512, 512), augment="scaled", color="distort")
    config.model.update(vit("B", patch=16), positions="learned", drop_path=0.1, auto=SHAPE)
    config.method.update(head="upernet", train_blocks=-1, background=-1, test="slide")
    config.optim.update(warmup="1500 steps", betas=(0.9, 0.999), schedule="poly", layer_decay=0.65)
    config.train.duration = "160000 steps"
    config.checkpoint.every = "16000 steps"
    config.eval.update(crop_ratio=(1.0,), every="16000 steps")
    mae(config)
    ade20k(config)
    protocols = {"mae": mae, "beit": beit, "ibot": ibot, "xcit": xcit}
    return resolve(config, arg, protocols, {"ade20k": ade20k, "mosaic": mosaic}, held=presets.held, runlocal=runlocal)


def metric(arg: str = "") -> str:
    """Returns the metric to report."""
    return "own_size/miou"


def located(config: ConfigDict, path: str) -> None:
    """Sets a folder with `images` and `annotations`, such as that of ADE20K."""
    config.data.update(path=f"{path}/images", mask_key=f"{path}/annotations")


def peak(config: ConfigDict, lr: float) -> None:
    """Sets the peak learning rate for a batch of 16; the warm-up starts at a millionth of it."""
    config.optim.update(lr=lr * 256 / BATCH, warmup_lr=lr * 1e-6)


def mae(config: ConfigDict) -> None:
    """Adds relative position biases and LayerScale for fine-tuning."""
    peak(config, 1e-4)
    config.method.relative_position_bias = True
    config.model.layer_scale = 1.0


def beit(config: ConfigDict) -> None:
    """Adds relative position biases, and keeps the encoder's LayerScale."""
    peak(config, 7e-4)
    config.method.relative_position_bias = True
    config.model.update(layer_scale=0.0, auto=(*SHAPE, "layer_scale"))


def ibot(config: ConfigDict) -> None:
    """Keeps the encoder's blocks unchanged, and applies the encoder's norm to each of the four maps."""
    peak(config, 8e-5)
    config.method.update(relative_position_bias=False, encoder_norm=True)
    config.model.update(layer_scale=0.0, auto=(*SHAPE, "layer_scale"))


def xcit(config: ConfigDict) -> None:
    """Keeps the encoder's blocks unchanged, with the same learning rate in all of them."""
    peak(config, 6e-5)
    config.optim.update(weight_decay=0.01, layer_decay=1.0)
    config.method.update(relative_position_bias=False, head_width=512, test="whole")
    config.model.update(layer_scale=0.0, drop_path=0.05, drop_path_rates="constant", auto=(*SHAPE, "layer_scale"))


def ade20k(config: ConfigDict) -> None:
    """Sets ADE20K, whose masks have 0 for other, ignored pixels, in the folders training/ and validation/."""
    config.data.update(source="folder", name="ade20k", eval_split="val", mask_offset=1)
    config.method.classes = 150


def mosaic(config: ConfigDict) -> None:
    """Sets mosaics of three photographs each, without a background class."""
    config.data.update(source="photo_mosaic", name="", eval_split="test", mask_offset=0, image_size=(40, 40),
                       scales=(1.0, 1.6))
    config.model.update(width=128, depth=6, heads=4, patch=(4, 4))
    config.method.update(classes=17, head_width=32, aux_width=16)
    config.optim.update(lr=1.6e-2, warmup="50 steps", warmup_lr=0.0)
    config.train.duration = "400 steps"
    config.checkpoint.every = config.eval.every = "200 steps"
    config.log.every = "20 steps"


def runlocal(config: ConfigDict) -> None:
    """Shrinks the recipe as `presets.runlocal` does, with images that have masks."""
    presets.runlocal_with_masks(config, mosaic)
