r"""SplitMask pre-training on small target data only, the protocol of arXiv 2112.10740.

  python -m mae_jax.main --config=configs/splitmask_small.py:cars --workdir=runs/cars \
      --config.data.path=/path/to/tensorflow_datasets
  python -m mae_jax.main --config=configs/splitmask_small.py:folder,S --workdir=runs/mine \
      --config.data.path=/path/to/images --config.batch_size=256

Arguments, separated by commas: the data, a size, `runlocal` (two small steps on a laptop). Sizes: `B` (the default),
`S`. Data: `cars`, `sketch`, `clipart`, `painting` (DomainNet, TFDS's cleaned one), `food101`, `coco`, `imagenet_1pct`,
`imagenet_10pct` (TFDS's subsets), prepared with `tfds build`; `folder` (the default), your own images.

The number of iterations is the same for all data, that of 300 epochs of ImageNet: 3,000 epochs on 10 % of it, 30,000 on
1 %. Target data sets stop at 5,000 epochs, since longer training hurt on Cars. The vocabulary is built from the
training data only. A twentieth of them is held out. Every twentieth of the run, k-NN on this part selects the
checkpoint to keep under best/ (the held-out loss for data without labels and for `folder`; with class folders set
--config.checkpoint.best_metric=knn/top1). The last and the best checkpoint are evaluated once on the evaluation split.

The paper's optimizer is not known to us; we use BEiT's, as in configs/vit_b_splitmask.py. The held-out part and the
metric are our choice. For a shorter run: --config.train.duration='1e6 examples'.

Expected (the paper's figures, not reproduced here): fine-tuned on iNaturalist-2019 after pre-training on 1 % and on
10 % of ImageNet 74.8 and 75.4 (on all of it 75.4), on COCO 76.3 (Table 1); detection on COCO after pre-training on COCO
46.8 box AP (Table 4).
"""

from functools import partial

from ml_collections import ConfigDict

from mae_jax.config import default, resolve, vit

ITERATED = 300 * 1_281_167  # examples of every run, for any data
WARMED = 10 * 1_281_167  # examples of the warm-up
NAMES = {  # argument → data set of TFDS, and its held-out split
    "cars": ("cars196:2.*.*", "test"),
    "sketch": ("domainnet/sketch:1.*.*", "test"),
    "clipart": ("domainnet/clipart:1.*.*", "test"),
    "painting": ("domainnet/painting:1.*.*", "test"),
    "food101": ("food101:2.*.*", "validation"),
    "coco": ("coco/2017:1.*.*", "validation"),
    "imagenet_1pct": ("imagenet2012_subset/1pct:5.*.*", "validation"),
    "imagenet_10pct": ("imagenet2012_subset/10pct:5.*.*", "validation"),
}
UNLABELED = ("coco",)


def get_config(arg: str = "") -> ConfigDict:
    config = default("splitmask")
    config.batch_size = 2048
    config.data.update(source="folder", train_split="train[:95%]", val_split="train[95%:]")
    config.model.update(layer_scale=0.1, drop_path=0.1, pool="mean")
    config.optim.update(lr=1.875e-4, min_lr=1e-5, betas=(0.9, 0.98), clip=3.0)
    config.optim.warmup = f"{WARMED} examples, at most 125 epochs"
    config.train.duration = f"{ITERATED} examples, at most 5000 epochs"
    config.eval.every = config.checkpoint.every = f"{ITERATED // 20} examples, at most 250 epochs"
    config.checkpoint.best_metric = "loss"
    size(config, "B")
    data = {"folder": lambda _: None, **{name: partial(prepared, name=name) for name in NAMES}}
    return resolve(config, arg, {name: partial(size, name=name) for name in ("S", "B")}, data)


def size(config: ConfigDict, name: str) -> None:
    """Sets the encoder's size, and the decoder's width and heads to the same."""
    config.model.update(vit(name, patch=16))
    config.method.update(decoder_width=config.model.width, decoder_heads=config.model.heads)


def prepared(config: ConfigDict, name: str) -> None:
    """Reads a data set of TFDS."""
    found, held_out = NAMES[name]
    config.data.update(source="tfds", name=found, eval_split=held_out)
    if name not in UNLABELED:
        config.checkpoint.best_metric = "knn/top1"
    if name.startswith("imagenet"):  # without the limit in epochs, as in the paper
        config.train.duration, config.optim.warmup = f"{ITERATED} examples", f"{WARMED} examples"
        config.eval.every = config.checkpoint.every = f"{ITERATED // 20} examples"
