r"""A dense probe: how well a linear layer tells the class of each pixel from the patches of a frozen encoder.

  python -m mae_jax.main --config=configs/segment.py --workdir=runs/segment --config.init_from=runs/mine

The encoder has the shape of that of `init_from`; without `init_from` it is that of configs/folder.py (ViT-Ti/8), and
random, which is the floor that any other must beat. Images are 128 x 128, or as --config.data.image_size says. With
--config.method.train_blocks=-1 --config.optim.lr=1e-3 all of it is fine-tuned, and --config.method.block=7 probes an
earlier block.

Arguments, one of them:
  clipart          the default: drawings of Debian's package openclipart-png, 1231 to train on, and what is not
                   transparent in them: 2 classes. Here eval/attention_iou is of use, too
  mosaic           parts of photographs that need no download, with the encoder of folder:laptop: which of 17
                   photographs is a pixel from? Minutes on a laptop
  pets             Oxford-IIIT Pet of TFDS: pet, background, outline
  voc              PASCAL VOC 2012: --config.data.path=VOCdevkit/VOC2012/pictures
                   --config.data.mask_key=VOCdevkit/VOC2012/SegmentationClass, 20 classes and background. `pictures` has
                   train/ and val/ with the pictures of ImageSets/Segmentation, the other folder the masks likewise
  scene_parse150   the 150 classes of ADE20K's scene parsing, its authors' ADEChallengeData2016.zip unpacked to DIR:
                   --config.data.path=DIR/images --config.data.mask_key=DIR/annotations (TFDS has other numbers under
                   this name: 100 kinds of instances)
  held             trains on nine tenths of the training data and reads the rest of it in place of the test data
  runlocal         two small steps of any of them, on mosaics, or on your own data where --config.data.path says so

The last three have the encoder of configs/vit_b_mae.py, at 224 x 224. eval/miou and eval/pixel_accuracy are at that
size and of the central square: not comparable with published figures, which are at the pictures' own size. No paper has
this recipe; all values are our choice, and none of the last three has been run.
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
    config.optim.update(lr=0.08, warmup="1 epochs", betas=(0.9, 0.999), weight_decay=0.0)  # a head bears that much
    config.train.duration = "20 epochs"
    clipart(config)
    config.model.auto = SHAPE  # of init_from
    return resolve(config, arg, clipart=clipart, mosaic=mosaic, pets=pets, voc=voc, scene_parse150=scene_parse150,
                   held=presets.held, runlocal=runlocal)


def metric(arg: str = "") -> str:
    """Returns the name of what is reported."""
    return "miou"


def clipart(config: ConfigDict) -> None:
    """Things on white; pictures of which the whole, or nothing, is a thing are few."""
    config.data.update(source="clipart", image_size=(128, 128))
    config.model.update(vit("Ti", patch=8))


def mosaic(config: ConfigDict) -> None:
    """Photographs in three parts; no class is a background."""
    config.data.update(source="photo_mosaic", image_size=(40, 40))
    config.model.update(width=128, depth=6, heads=4, patch=(4, 4))
    config.method.update(classes=17, background=-1)


def pets(config: ConfigDict) -> None:
    """Trimaps of 1, 2 and 3."""
    large(config, source="tfds", name="oxford_iiit_pet", mask_key="segmentation_mask", mask_offset=1)
    config.method.update(classes=3, background=1)


def voc(config: ConfigDict) -> None:
    """Masks whose 255 is ignored."""
    large(config, source="folder", eval_split="val")
    config.method.classes = 21


def scene_parse150(config: ConfigDict) -> None:
    """Masks whose 0 is everything else, which is ignored; folders training/ and validation/."""
    large(config, source="folder", name="ade20k", eval_split="val", mask_offset=1)
    config.method.update(classes=150, background=-1)


def large(config: ConfigDict, **data: object) -> None:
    """Sets the size of the encoders that learned from ImageNet, and the data."""
    config.data.update(image_size=(224, 224), **data)
    config.model.update(vit("B", patch=16))


def runlocal(config: ConfigDict) -> None:
    """As for every recipe, but on images that have masks."""
    presets.runlocal_with_masks(config, mosaic)
