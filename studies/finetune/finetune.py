"""Fine-tunes a small encoder of photographs (study.py) on crops of these.

  python -m mae_jax.main --config=studies/finetune/finetune.py --workdir=runs/finetune \
      --config.init_from=runs/photographs

The task: from which of 17 photographs is a crop? Training has ten labeled crops of each. Of the 200 crops per
photograph in the training split, the last 50 choose the checkpoint; the test crops are read once, at the end. Training
and validation crops overlap: with 150 labels the former cover 84 % of the latter's area, with 10 labels 16 %. Test
crops overlap with neither.

Arguments: `labels50` and `all` (50 and 150 labels for each photograph), `scratch` (no encoder to start from, and then
no layer-wise decay), `probe` (trains the head alone, behind a batch norm), `runlocal`. All values are our choice.
"""

import runpy
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from mae_jax.config import SHAPE, default, resolve

PHOTOGRAPHS = 17  # neighbors in the training split come from different photographs
# The arguments `scratch` and `probe` are those of the quickstart's fine-tuning.
LETTERS = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "quickstart_finetune.py"))


def get_config(arg: str = "") -> ConfigDict:
    config = default("supervised")
    config.batch_size = 64
    config.data.update(image_size=(40, 40), crop_scale=(0.4, 1.0), val_split=f"train[{150 * PHOTOGRAPHS}:]")
    config.eval.update(crop_ratio=(1.0,), every="100 steps")
    config.checkpoint.update(every="100 steps", best_metric="top1")
    config.model.update(width=128, depth=6, heads=4, patch=(4, 4), pool="mean", positions="learned", drop_path=0.1)
    config.method.update(smoothing=0.1)
    config.optim.update(lr=1.2e-2, warmup="20 steps", betas=(0.9, 0.999), layer_decay=0.75)
    config.train.duration = "100 steps"  # however many labels
    labels(config, 10)
    config.model.auto = SHAPE  # of init_from
    return resolve(config, arg, labels50=partial(labels, number=50), all=partial(labels, number=150),
                   scratch=LETTERS["scratch"], probe=LETTERS["probe"])


def labels(config: ConfigDict, number: int) -> None:
    """Trains with so many labeled crops of each photograph."""
    config.data.train_split = f"train[:{number * PHOTOGRAPHS}]"
