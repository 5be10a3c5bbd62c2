r"""Fine-tunes a MAE encoder end to end on ImageNet-1K (arXiv 2111.06377, A.1 and Table 9).

  python -m mae_jax.main --config=configs/finetune.py:L --workdir=gs://BUCKET/finetune_l \
      --config.init_from=gs://BUCKET/vit_l_mae --config.data.path=gs://BUCKET/tensorflow_datasets

Arguments, separated by commas:

  `B` (the default, ViT-B/16), `L` (ViT-L/16), `H` (ViT-H/14)
  `repo`     (the default) facebookresearch/mae, FINETUNE.md, for encoders of configs/vit_*_mae.py:repo, which had
             normalised pixels and 1600 epochs
  `paper`    Table 9, for encoders of configs/vit_*_mae.py, which had plain pixels
  `scratch`  Table 11: no encoder to start from, and a recipe of its own; leave init_from empty
  `cls`      the class token in place of the mean of the patch tokens, which does about as well, they say
  `runlocal` two small steps on a laptop

Expected, all of it theirs and not ours (ImageNet-1K top-1, B / L / H): 83.664 / 85.952 / 86.928 with `repo` (its
released models; the mean of four seeds for B is 83.57, deviation 0.08, for L 85.87, 0.07); 84.9 for L with `paper`
after 800 epochs (Table 1); 82.3 / 82.6 / 83.1 with `scratch`, and 82.1 / 81.5 / 80.9 with its last parameters in place
of the averaged ones, eval/raw/top1 here (Table 11; others have come to 81.9 and 82.0). `repo` took 7, 9 and 13 hours on
32 V100s, H on 64.

Partial fine-tuning (section 4.3) is one field: the last so many blocks learn, with the norms and the head behind them.

  --config=configs/finetune.py:L,paper --config.method.train_blocks=4 --config.train.duration='100 epochs'

  blocks    0     0.5    1      2      4      6      12     18     24
  top-1     73.5  79.1   81.0   83.1   84.2   84.4   84.6   84.7   84.9

Theirs again (Figure 9: ViT-L/16, plain pixels, 800 epochs; 0.5 is the MLP of the last block), each the best of 50, 100
and 200 epochs: the fewer blocks learn, the longer they need. For 0 blocks use configs/linear_probe.py.
"""

from functools import partial

from ml_collections import ConfigDict

from mae_jax.config import SHAPE, default, resolve, vit

B, L, H = 768, 1024, 1280  # widths, by which the tables tell sizes apart


def get_config(arg: str = "") -> ConfigDict:
    config = default("supervised")
    config.batch_size = 1024
    config.data.update(source="tfds", name="imagenet2012:5.*.*", eval_split="validation", color="rand",
                       crop_scale=(0.08, 1.0))
    config.model.update(pool="mean", positions="learned")
    config.method.update(smoothing=0.1, mixup=0.8, cutmix=1.0)
    # The paper names no lowest learning rate; the 1e-6 of the published code is used in every recipe.
    config.optim.update(warmup="5 epochs", min_lr=1e-6, betas=(0.9, 0.999))
    config.checkpoint.every = config.eval.every = "5 epochs"
    size(config, "B")
    config.model.auto = SHAPE  # of init_from, unless a size is named
    sizes = {name: partial(size, name=name) for name in ("B", "L", "H")}
    return resolve(config, arg, sizes, {"repo": repo, "paper": paper, "scratch": scratch}, cls=cls)


def size(config: ConfigDict, name: str) -> None:
    """Sets the encoder's size, and for it the recipe `repo`."""
    config.model.update(vit(name, patch=14 if name == "H" else 16), auto=())
    repo(config)


def repo(config: ConfigDict) -> None:
    """FINETUNE.md; the effect of random erasing, it says, is smaller than the noise."""
    width = config.model.width
    config.model.drop_path = {B: 0.1, L: 0.2, H: 0.3}[width]
    config.method.erase = 0.25
    config.optim.update(lr={B: 5e-4, L: 1e-3, H: 1e-3}[width], layer_decay={B: 0.65, L: 0.75, H: 0.75}[width])
    config.train.duration = {B: "100 epochs", L: "50 epochs", H: "50 epochs"}[width]


def paper(config: ConfigDict) -> None:
    """Table 9, which has no random erasing."""
    config.model.drop_path = {B: 0.1, L: 0.1, H: 0.2}[config.model.width]
    config.method.erase = 0.0
    config.optim.update(lr=1e-3, layer_decay=0.75)


def scratch(config: ConfigDict) -> None:
    """Table 11. Positions are learned from the sine-cosine ones, as in fine-tuning; about that the paper is silent."""
    width = config.model.width
    config.batch_size = 4096
    config.model.drop_path = {B: 0.1, L: 0.2, H: 0.2}[width]
    config.method.erase = 0.0
    config.optim.update(lr=1e-4, warmup="20 epochs", betas=(0.9, 0.95), weight_decay=0.3, layer_decay=1.0, ema=0.9999)
    config.train.duration = {B: "300 epochs", L: "200 epochs", H: "200 epochs"}[width]
    config.checkpoint.every = config.eval.every = "20 epochs"


def cls(config: ConfigDict) -> None:
    """The class token behind the encoder's own norm goes to the head."""
    config.model.pool = "cls"
