"""Fine-tuning of any encoder on the data sets of the papers' transfer tables, one recipe per data set.

  python -m mae_jax.main --config=configs/transfer.py:dtd --workdir=runs/dtd --config.init_from=runs/pretrained
  python -m mae_jax transfer --config=configs/transfer.py --names=cifar10,dtd --from=runs/pretrained --to=runs/suite

The second command runs many data sets and adapts the recipe to the encoder's size. Arguments, joined by commas in any
order:
  the data set: a name in `DATA` below (default: cifar10);
  the size: B (the default), L, H, Ti or S, with its layer decay and stochastic depth;
  the protocol: `finetune` (the default), or `linear`: a frozen encoder, batch norm and one layer. k-NN and a linear
    probe on features that are computed once need no recipe: mae_jax transfer --protocols=quick;
  `held`: trains on a part of the training data and evaluates on the rest of it (data.val_split) instead of the test
    data, to select a learning rate or a length; `runlocal` (not for voc2007, which has no small replacement).

The 11 data sets of MoCE and MixedAE (aircraft to voc2007) have the splits and metrics of Kornblith and Ericsson, which
we assume these papers follow. The 7 of SplitMask's Table 3, among them cars and food101 of the 11, have top-1.
DomainNet is TFDS's cleaned version, a little smaller than SplitMask's. Data sets of TFDS are prepared with
`tfds build`. Two are not in TFDS and are read from the folders aircraft and inaturalist2019 in $TFDS_DATA_DIR (or
~/tensorflow_datasets):
  aircraft/train/<variant>/*.jpg: the 6,667 of images_variant_trainval.txt; aircraft/test/<variant>/*.jpg: 3,333;
  inaturalist2019/train/<category>/*.jpg and inaturalist2019/val/<category>/*.jpg.

`finetune` is MAE's Table 9 with the published code's values for each size (FINETUNE.md); `linear` is Table 10 with the
crop of the released code. As far as we know, no paper states the length and the batch size for these data sets. Our
choice: batches of 256 and 5,000 steps (20,000 with 50,000 or more images; iNaturalist: 100 epochs with batches of 1024,
Table 9), the values of Ti and S, and labels that include VOC's difficult objects. iBOT's protocol is 1,000 epochs (360
on iNaturalist). The learning rate matters on small data sets: try several with --lrs of mae_jax transfer.
Expected: unknown; none of these has been run to its end.
"""

import os
from functools import partial
from typing import NamedTuple

from ml_collections import ConfigDict

from mae_jax.config import SHAPE, default, resolve, vit


class DataSet(NamedTuple):
    """A data set with its splits and metric."""

    name: str  # TFDS's name; without a version, a folder in TFDS's folder
    classes: int
    metric: str = "top1"  # top1, mean_per_class, or map (11-point mean average precision)
    train: str = "train"
    test: str = "test"
    held: tuple[str, str] = ("train[:90%]", "train[90%:]")  # `held`'s splits; the default tenth is our choice
    duration: str = "5000 steps"
    label_key: str = "label"


WITH_VALIDATION = {"train": "train+validation", "held": ("train", "validation")}
INAT = {"test": "validation", "duration": "100 epochs"}
DATA = {
    "aircraft": DataSet("aircraft", 100, "mean_per_class"),
    "caltech101": DataSet("caltech101:3.*.*", 102, "mean_per_class"),
    "cars": DataSet("cars196:2.*.*", 196),
    "cifar10": DataSet("cifar10:3.*.*", 10, duration="20000 steps"),
    "cifar100": DataSet("cifar100:3.*.*", 100, duration="20000 steps"),
    "dtd": DataSet("dtd:3.*.*", 47, **WITH_VALIDATION),
    "flowers": DataSet("oxford_flowers102:2.*.*", 102, "mean_per_class", **WITH_VALIDATION),
    "food101": DataSet("food101:2.*.*", 101, test="validation", duration="20000 steps"),
    "pets": DataSet("oxford_iiit_pet:4.*.*", 37, "mean_per_class"),
    "sun397": DataSet("sun397/standard-part1-120k:4.*.*", 397),
    "voc2007": DataSet("voc/2007:5.*.*", 20, "map", label_key="labels", **WITH_VALIDATION),
    "inaturalist2018": DataSet("i_naturalist2018:1.*.*", 8_142, **INAT),
    "inaturalist2019": DataSet("inaturalist2019", 1_010, **INAT),
    "clipart": DataSet("domainnet/clipart:1.*.*", 345),
    "painting": DataSet("domainnet/painting:1.*.*", 345, duration="20000 steps"),
    "sketch": DataSet("domainnet/sketch:1.*.*", 345, duration="20000 steps"),
}

FOLDERS = ("aircraft", "inaturalist2019")

SIZES = {  # base learning rate, layer decay, stochastic depth: MAE FINETUNE.md; Ti and S: as B, without the depth
    "Ti": (5e-4, 0.65, 0.0), "S": (5e-4, 0.65, 0.0), "B": (5e-4, 0.65, 0.1), "L": (1e-3, 0.75, 0.2),
    "H": (1e-3, 0.75, 0.3),
}


def get_config(arg: str = "") -> ConfigDict:
    config = default("supervised")
    data(config, "cifar10")
    size(config, "B")
    config.model.auto = SHAPE  # the shape of init_from's encoder, unless a size is given
    presets = {**{name: partial(data, name=name) for name in DATA},
               **{name: partial(size, name=name) for name in SIZES},
               "finetune": finetune, "linear": linear, "held": held}
    order = {name: place for place, name in enumerate(presets)}  # a protocol may override a size's fields
    names = [name for name in arg.split(",") if name]
    names += ["finetune"] * ("linear" not in names)
    return resolve(config, ",".join(sorted(names, key=lambda name: order.get(name, len(order)))), **presets)


def metric(arg: str = "") -> str:
    """Returns the metric of the data set in the recipe's argument."""
    return next((DATA[name].metric for name in arg.split(",") if name in DATA), DATA["cifar10"].metric)


def data(config: ConfigDict, name: str) -> None:
    """Sets the data set, the length, and whether images have several labels."""
    row = DATA[name]
    beside = os.path.join(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"), name)
    folder = name in FOLDERS
    config.data.update(source="folder" if folder else "tfds", name=row.name, path=beside if folder else "",
                       train_split=row.train, eval_split=row.test, label_key=row.label_key)
    config.batch_size = 1024 if row.duration.endswith("epochs") else 256
    config.train.duration, config.eval.every = row.duration, "1e9 steps"  # evaluates the test data only at the end
    config.checkpoint.every = "5 epochs" if row.duration.endswith("epochs") else "1000 steps"
    several = row.metric == "map"  # several labels per image
    config.method.update(multi_label=several, loss="bce" if several else "cross_entropy",
                         classes=row.classes if several else 0)


def size(config: ConfigDict, name: str) -> None:
    """Sets the encoder's shape, and the fields of fine-tuning that depend on it."""
    config.model.update(vit(name, patch=14 if name == "H" else 16), auto=())
    config.optim.lr, config.optim.layer_decay, config.model.drop_path = SIZES[name]


def finetune(config: ConfigDict) -> None:
    """Sets MAE's Table 9, with the mean of the patches as features and learned positions, as in the released code.

    With several labels per image, there is no mixup, cutmix or label smoothing.
    """
    one = not config.method.multi_label
    config.data.update(crop_scale=(0.08, 1.0), color="rand")
    config.model.update(pool="mean", positions="learned")
    config.method.update(head="linear", train_blocks=-1, erase=0.25, smoothing=0.1 * one, mixup=0.8 * one,
                         cutmix=1.0 * one, head_std=2e-5)
    config.optim.update(name="adamw", betas=(0.9, 0.999), weight_decay=0.05, min_lr=1e-6, warmup=warmup(config))


def linear(config: ConfigDict) -> None:
    """Sets MAE's Table 10: class token of a frozen encoder, batch norm, one layer, LARS; crops drawn once and clamped.
    """
    config.data.update(augment="single", crop_scale=(0.08, 1.0), color="none")
    config.model.update(pool="cls", drop_path=0.0)
    config.method.update(head="probe", train_blocks=0, erase=0.0, smoothing=0.0, mixup=0.0, cutmix=0.0, head_std=0.01)
    config.optim.update(name="lars", lr=0.1, layer_decay=1.0, weight_decay=0.0, min_lr=0.0, warmup=warmup(config))


def warmup(config: ConfigDict) -> str:
    """Returns a twentieth of the length, as in Table 9 (5 of 100 epochs)."""
    length, unit = config.train.duration.split()
    return f"{int(length) // 20} {unit}"


def held(config: ConfigDict) -> None:
    """Holds out a part of the training data for selection, and disables the evaluation on test data."""
    row = next(row for row in DATA.values() if (row.name, row.train) == (config.data.name, config.data.train_split))
    config.data.train_split, config.data.val_split = row.held
    config.eval.test = False
    config.eval.every = config.checkpoint.every
