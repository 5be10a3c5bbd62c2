"""Fine-tunes the quickstart's encoder to name letters, in minutes on a laptop.

  python -m mae_jax.main --config=configs/quickstart_finetune.py --workdir=runs/finetune \
      --config.init_from=runs/quickstart

Ten labeled images of each letter are learned from. The last 780 of the training split choose the checkpoint; the test
images, in other fonts and on other parts of photographs, are read once, at the end.

Arguments: `labels50` and `all` (50 and 900 labels for each letter), `scratch` (no encoder to start from, and then no
layer-wise decay), `probe` (the head alone learns, behind a batch norm), `runlocal`. All values are our choice.
"""

from functools import partial

from ml_collections import ConfigDict

from mae_jax.config import SHAPE, default, resolve

LETTERS = 26  # neighbors in the training split are different letters


def get_config(arg: str = "") -> ConfigDict:
    config = default("supervised")
    config.batch_size = 64
    config.data.update(source="letters", image_size=(32, 32), augment="none", val_split=f"train[{970 * LETTERS}:]")
    config.data.workers = "0"  # letters are made faster than processes start
    config.eval.update(crop_ratio=(1.0,), every="100 steps", max_examples=780)
    config.checkpoint.update(every="100 steps", best_metric="top1")
    config.model.update(width=96, depth=4, heads=4, patch=(4, 4), pool="mean", positions="learned", drop_path=0.1)
    config.method.update(smoothing=0.1)
    config.optim.update(lr=1.2e-2, warmup="20 steps", betas=(0.9, 0.999), layer_decay=0.75)
    config.train.duration = "200 steps"  # however many labels
    labels(config, 10)
    config.model.auto = SHAPE  # of init_from
    return resolve(config, arg, labels50=partial(labels, number=50), all=partial(labels, number=900), scratch=scratch,
                   probe=probe)


def labels(config: ConfigDict, number: int) -> None:
    """Trains with so many labeled images of each letter."""
    config.data.train_split = f"train[:{number * LETTERS}]"


def scratch(config: ConfigDict) -> None:
    """From random weights: every layer learns at the full rate, and drops out less."""
    config.optim.layer_decay = 1.0
    config.model.drop_path = 0.0


def probe(config: ConfigDict) -> None:
    """The encoder is frozen: batch norm without scale and shift, and one layer (MAE A.1, with AdamW)."""
    config.model.update(positions="fixed", drop_path=0.0)
    config.method.update(head="probe", head_std=0.01, train_blocks=0.0, smoothing=0.0)
    config.optim.update(weight_decay=0.0, layer_decay=1.0)
