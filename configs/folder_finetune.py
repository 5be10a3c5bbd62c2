r"""Fine-tuning on your own images in class folders, sized for small data.

  python -m mae_jax.main --config=configs/folder_finetune.py --workdir=runs/classifier \
      --config.data.path=/path/to/images --config.init_from=runs/mine

Images are in path/<class>/*.jpg, or in path/train/<class>/*.jpg and path/val/<class>/*.jpg. The encoder is that of
configs/folder.py, trained on the same images or on more of them, which need no labels; without --config.init_from use
`scratch`.

The training part is path/train, or all but a held-out tenth. Its last tenth, by a hash of the file names, selects the
checkpoint: it is evaluated every 5 epochs, or 20 steps, as val/top1, and the best state is kept under <workdir>/best.
The held-out part is evaluated once, at the end: eval/top1 for the last state, eval/best/top1 for the best one. Other
shares:

  --config.data.train_split='train[:80%]' --config.data.val_split='train[80%:]'

Arguments, separated by commas: `Ti` (the default), `S` or `laptop` (with the same argument of configs/folder.py), `B`
(ViT-B/16 at 224 pixels, for encoders of configs/vit_b_mae.py or exported ones); `scratch` (random weights, three times
as long, no layer-wise decay: the baseline for the encoder); `all` (train on the whole training part and keep the last
state, for few images, when there is nothing to select); `plain` (no mixup, cutmix and RandAugment, which a short run is
slowed down by; `laptop` has none); `runlocal`.

There is no published recipe for this; the values are our choice: those of MAE's fine-tuning (configs/finetune.py) with
smaller batches, and with changes for few labels, measured with small encoders (studies/finetune/instrument.md): at
least 400 steps; a higher rate, which for Ti and S peaks where MAE's ViT-B does at its batch of 1024; and a batch norm
before the head, where MAE has a layer norm (--config.method.head=linear). `laptop` has no layer-wise decay, which costs
so small an encoder accuracy; the other sizes have 0.75, unmeasured. The recipe has not been run to its end with
Ti, S or B. If classes differ by color, or by left and right, set --config.data.color=none or --config.data.flip=False.
"""

from functools import partial

from ml_collections import ConfigDict

from mae_jax.config import SHAPE, default, resolve, vit


def get_config(arg: str = "") -> ConfigDict:
    config = default("supervised")
    config.batch_size = 64
    config.data.update(source="folder", train_split="train[:90%]", val_split="train[90%:]", color="rand")
    config.model.update(pool="mean", positions="learned", drop_path=0.1)
    config.method.update(head="probe", smoothing=0.1, mixup=0.8, cutmix=1.0)  # a head behind a batch norm
    config.optim.update(warmup="5 epochs, at least 20 steps", min_lr=1e-6, betas=(0.9, 0.999), layer_decay=0.75)
    config.train.duration = "100 epochs, at least 400 steps"  # a few steps barely move a head from its start
    config.checkpoint.update(every="5 epochs, at least 20 steps", best_metric="top1")
    config.eval.every = "5 epochs, at least 20 steps"
    size(config, "Ti")
    config.model.auto = SHAPE  # the shape of init_from's encoder, unless a size is given
    sizes = {"laptop": laptop, **{name: partial(size, name=name) for name in ("Ti", "S", "B")}}
    return resolve(config, arg, sizes, scratch=scratch, all=everything, plain=plain)


def size(config: ConfigDict, name: str) -> None:
    """Sets the encoder's and the images' size: 256 patches at 128 × 128 pixels, for B 196 at 224 × 224."""
    large = name == "B"
    config.data.image_size = (224, 224) if large else (128, 128)
    config.model.update(vit(name, patch=16 if large else 8), auto=())
    config.optim.lr = 1e-3 if large else 8e-3  # per 256 images; small encoders tolerate more


def laptop(config: ConfigDict) -> None:
    """Sets the encoder's and the images' size to those of folder:laptop, and batches that a few images fill."""
    config.batch_size = 32
    config.data.update(image_size=(40, 40), crop_scale=(0.4, 1.0))
    config.eval.crop_ratio = (1.0,)
    config.model.update(width=128, depth=6, heads=4, patch=(4, 4), auto=())
    config.optim.lr = 4e-2  # a peak of 5e-3, which validation chose of three (studies/finetune/study.py)
    config.optim.layer_decay = 1.0  # 0.75 costs small encoders accuracy (studies/finetune/instrument.md)
    plain(config)


def scratch(config: ConfigDict) -> None:
    """Trains from random weights: longer, with one learning rate in all layers, which is lower for small encoders."""
    config.optim.update(lr={128: 1.2e-2, 192: 2e-3, 384: 2e-3, 768: 1e-3}[config.model.width], layer_decay=1.0)
    config.train.duration = "300 epochs, at least 1200 steps"


def plain(config: ConfigDict) -> None:
    """Mixes no images and leaves their colors."""
    config.data.color = "none"
    config.method.update(mixup=0.0, cutmix=0.0)


def everything(config: ConfigDict) -> None:
    """Trains on the whole training part, without validation."""
    config.data.update(train_split="train", val_split="")
    config.checkpoint.best_metric = ""
