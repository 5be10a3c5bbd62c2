r"""Semantic segmentation by UperNet on an encoder that is fine-tuned: what papers report of ADE20K.

  python -m mae_jax.main --config=configs/upernet.py --workdir=runs/upernet --config.init_from=runs/mine \
      --config.data.path=ADEChallengeData2016/images --config.data.mask_key=ADEChallengeData2016/annotations

Figures of different protocols are not comparable; name the protocol beside the number. All train 160,000 steps of 16
images of 512 x 512, which is 127 epochs. The encoder has the shape of that of `init_from`; the values are those of
ViT-B, whatever its size. eval/own_size/miou is what the papers report: at the annotations' own size. No published
figure has been reproduced with these recipes.

The protocol, one of them:
  mae        the default: MAE's, in its reproduction (implus/mae_segmentation). Relative position biases and a layer
             scale of 1 are added to the encoder; windows of 512 every 341. ViT-B: mIoU 48.15 there, 48.1 in the paper
             (1,600 epochs of pre-training)
  beit       BEiT's after self-supervision (microsoft/unilm). Relative position biases, the encoder's own layer scale;
             windows likewise. ViT-B: 47.1, by MAE's Table 5
  ibot       iBOT's, which MixedAE and MoCE are taken to use. The encoder's norm on its four maps, windows likewise.
             iBOT ViT-B: 50.0
  xcit       XCiT's (facebookresearch/xcit), which DeiT III and SplitMask are taken to use. A narrower head, no layer
             decay, whole images. DeiT III ViT-B: 50.2, SplitMask ViT-B: 45.7, both remembered and not checked

The data, one of them:
  ade20k     the default: the 150 classes, the authors' ADEChallengeData2016.zip unpacked (docs/segmentation.md).
             Folders of your own likewise, with --config.data.name= --config.method.classes=... and, where 0 is a class,
             --config.data.mask_offset=0
  mosaic     parts of photographs that need no download, and a small encoder: that of folder:laptop. Minutes on a
             laptop; all values are our choice
  held       trains on nine tenths of the training data and reads the rest of it in place of the test data
  runlocal   two small steps of any of them, on mosaics

Of each paper, values that it or its code states are theirs. Ours are: weight decay (all kernels, class token and tables
of biases; BEiT's code leaves out what has one axis alone), batch norm over the global batch, and image resizing (PIL's
antialiased bicubic filter). The loss is the mean over the pixels that have a class; mmsegmentation divides by all.
"""

from ml_collections import ConfigDict

from mae_jax import presets
from mae_jax.config import default, resolve, vit

SHAPE = ("width", "depth", "heads", "patch", "mlp_ratio", "gelu")  # of init_from
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
    """Returns the name of what is reported."""
    return "own_size/miou"


def located(config: ConfigDict, path: str) -> None:
    """Sets a folder that holds `images` and `annotations`, as ADE20K is unpacked."""
    config.data.update(path=f"{path}/images", mask_key=f"{path}/annotations")


def peak(config: ConfigDict, lr: float) -> None:
    """Sets the highest learning rate, of a batch of 16; the warm-up starts a millionth as high."""
    config.optim.update(lr=lr * 256 / BATCH, warmup_lr=lr * 1e-6)


def mae(config: ConfigDict) -> None:
    """Learned relative positions and scales that are added in fine-tuning alone."""
    peak(config, 1e-4)
    config.method.relative_position_bias = True
    config.model.layer_scale = 1.0


def beit(config: ConfigDict) -> None:
    """The layer scale is that of the encoder."""
    peak(config, 7e-4)
    config.method.relative_position_bias = True
    config.model.update(layer_scale=0.0, auto=(*SHAPE, "layer_scale"))


def ibot(config: ConfigDict) -> None:
    """Plain blocks, and the encoder's norm on each of the four maps."""
    peak(config, 8e-5)
    config.method.update(relative_position_bias=False, encoder_norm=True)
    config.model.update(layer_scale=0.0, auto=(*SHAPE, "layer_scale"))


def xcit(config: ConfigDict) -> None:
    """Plain blocks, one learning rate for all of them."""
    peak(config, 6e-5)
    config.optim.update(weight_decay=0.01, layer_decay=1.0)
    config.method.update(relative_position_bias=False, head_width=512, test="whole")
    config.model.update(layer_scale=0.0, drop_path=0.05, auto=(*SHAPE, "layer_scale"))


def ade20k(config: ConfigDict) -> None:
    """Masks whose 0 is everything else, which is ignored; folders training/ and validation/."""
    config.data.update(source="folder", name="ade20k", eval_split="val", mask_offset=1)
    config.method.classes = 150


def mosaic(config: ConfigDict) -> None:
    """Photographs in three parts; no class is a background."""
    config.data.update(source="photo_mosaic", name="", eval_split="test", mask_offset=0, image_size=(40, 40),
                       scales=(1.0, 1.6))
    config.model.update(width=128, depth=6, heads=4, patch=(4, 4))
    config.method.update(classes=17, head_width=32, aux_width=16)
    config.optim.update(lr=1.6e-2, warmup="50 steps", warmup_lr=0.0)
    config.train.duration = "400 steps"
    config.checkpoint.every = config.eval.every = "200 steps"
    config.log.every = "20 steps"


def runlocal(config: ConfigDict) -> None:
    """As for every recipe, but on images that have masks."""
    presets.runlocal_with_masks(config, mosaic)
