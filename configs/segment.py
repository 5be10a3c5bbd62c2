r"""A dense linear probe: semantic segmentation by a linear layer on the patches of a frozen encoder.

  python -m mae_jax.main --config=configs/segment.py --workdir=runs/segment --config.init_from=runs/mine

The layer is behind a batch norm (--config.method.head=probe). The encoder has the shape of that of `init_from`. Without
`init_from`, it is a random one of the shape of configs/folder.py (ViT-Ti/8), a lower bound for trained ones. Images are
128 x 128 (--config.data.image_size). --config.method.head=linear --config.method.train_blocks=-1 --config.optim.lr=1e-3
fine-tunes the whole encoder, and --config.method.block=7 probes an earlier block.

Arguments, one of them:
  clipart          the default: drawings of Debian's package openclipart-png, 1231 for training, with 2 classes:
                   transparent or not. eval/attention_iou is meaningful here too
  mosaic           parts of photographs that need no download, with the encoder of folder:laptop; the class of
                   a pixel is its photograph, one of 17. Minutes on a laptop
  pets             Oxford-IIIT Pet of TFDS: pet, background, outline
  voc              PASCAL VOC 2012: --config.data.path=VOCdevkit/VOC2012/images
                   --config.data.mask_key=VOCdevkit/VOC2012/SegmentationClass, 20 classes and background. `images` has
                   train/ and val/ with the images of ImageSets/Segmentation, the other folder the masks likewise
  scene_parse150   the 150 classes of ADE20K's scene parsing; the authors' ADEChallengeData2016.zip unpacked to DIR:
                   --config.data.path=DIR/images --config.data.mask_key=DIR/annotations (TFDS's data set of this name
                   has other labels: 100 classes of instances)
  held             trains on nine tenths of the training data and evaluates on the rest instead of the test data
  runlocal         two small steps of any of them, on mosaics, or on your own data with --config.data.path

pets, voc and scene_parse150 have the encoder of configs/vit_b_mae.py, at 224 x 224. eval/miou and eval/pixel_accuracy
are of the central square at that size. They are not comparable with published figures, which are at the images' own
size. No paper has this recipe; all values are our choice, and none of these three has been run.
"""

from ml_collections import ConfigDict

from mae_jax import presets
from mae_jax.config import SHAPE, default, resolve, vit


def get_config(arg: str = "") -> ConfigDict:
    config = default("segment")
    config.batch_size = 64
    config.data.crop_scale = (0.4, 1.0)
    config.eval.update(crop_ratio=(1.0,), every="5 epochs")
    config.checkpoint.every = "5 epochs"
    config.method.head = "probe"
    config.optim.update(lr=0.08, warmup="1 epochs", betas=(0.9, 0.999), weight_decay=0.0)  # heads tolerate this rate
    config.train.duration = "20 epochs"
    clipart(config)
    config.model.auto = SHAPE  # the shape of init_from's encoder
    return resolve(config, arg, clipart=clipart, mosaic=mosaic, pets=pets, voc=voc, scene_parse150=scene_parse150,
                   held=presets.held, runlocal=runlocal)


def metric(arg: str = "") -> str:
    """Returns the metric to report."""
    return "miou"


def clipart(config: ConfigDict) -> None:
    """Sets drawings on white; few of them are entirely covered or entirely empty."""
    config.data.update(source="clipart", image_size=(128, 128))
    config.model.update(vit("Ti", patch=8))


def mosaic(config: ConfigDict) -> None:
    """Sets mosaics of three photographs each, without a background class."""
    config.data.update(source="photo_mosaic", image_size=(40, 40))
    config.model.update(width=128, depth=6, heads=4, patch=(4, 4))
    config.method.update(classes=17, background=-1)
    config.optim.lr = 0.32  # the best, and highest, of three that a tenth of the training data compared


def pets(config: ConfigDict) -> None:
    """Sets Oxford-IIIT Pet, whose trimaps have the values 1, 2 and 3."""
    large(config, source="tfds", name="oxford_iiit_pet", mask_key="segmentation_mask", mask_offset=1)
    config.method.update(classes=3, background=1)


def voc(config: ConfigDict) -> None:
    """Sets PASCAL VOC, whose masks have 255 for ignored pixels."""
    large(config, source="folder", eval_split="val")
    config.method.classes = 21


def scene_parse150(config: ConfigDict) -> None:
    """Sets ADE20K, whose masks have 0 for other, ignored pixels, in the folders training/ and validation/."""
    large(config, source="folder", name="ade20k", eval_split="val", mask_offset=1)
    config.method.update(classes=150, background=-1)


def large(config: ConfigDict, **data: object) -> None:
    """Sets the encoder and image size of configs/vit_b_mae.py, and the data."""
    config.data.update(image_size=(224, 224), **data)
    config.model.update(vit("B", patch=16))


def runlocal(config: ConfigDict) -> None:
    """Shrinks the recipe as `presets.runlocal` does, with images that have masks."""
    presets.runlocal_with_masks(config, mosaic)
