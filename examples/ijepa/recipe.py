"""ViT-B/16 I-JEPA on ImageNet-1K, 600 epochs (arXiv 2301.08243, appendix).

  python -m mae_jax train --config=examples/ijepa/recipe.py --workdir=runs/ijepa \
      --config.data.path=gs://BUCKET/tensorflow_datasets

Arguments: `runlocal` (two small steps on a laptop). The crop's scale is that of the released configs; the paper says
that no augmentation by hand is used. Adam's second beta is torch's default, which the paper does not name. It has not
been run.
"""

from ml_collections import ConfigDict

from mae_jax.config import default, resolve, vit


def get_config(arg: str = "") -> ConfigDict:
    config = default("ijepa")
    config.batch_size = 2048
    config.data.update(source="tfds", name="imagenet2012:5.*.*", eval_split="validation", crop_scale=(0.3, 1.0),
                       flip=False)
    config.model.update(vit("B", patch=16), pool="mean")
    config.optim.update(lr=1e-3 * 256 / 2048, warmup_lr=1e-4, min_lr=1e-6, warmup="15 epochs", betas=(0.9, 0.999),
                        weight_decay=0.04, final_weight_decay=0.4)
    config.train.duration = "600 epochs"
    return resolve(config, arg)
