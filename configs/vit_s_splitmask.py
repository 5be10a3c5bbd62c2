r"""ViT-S/16 SplitMask on ImageNet-1K, 300 epochs (arXiv 2112.10740).

  python -m mae_jax.main --config=configs/vit_s_splitmask.py --workdir=gs://BUCKET/vit_s_splitmask \
      --config.data.path=gs://BUCKET/tensorflow_datasets

Arguments: `runlocal` (two small steps on a laptop). configs/vit_b_splitmask.py lists which values are the paper's.

Expected (the paper's figure, not reproduced here; ImageNet-1K top-1, fine-tuned): 81.5.
"""

from ml_collections import ConfigDict

from mae_jax.config import default, resolve, vit


def get_config(arg: str = "") -> ConfigDict:
    config = default("splitmask")
    config.batch_size = 2048
    config.data.update(source="tfds", name="imagenet2012:5.*.*", eval_split="validation")
    config.model.update(vit("S", patch=16), layer_scale=0.1, drop_path=0.1, pool="mean")
    config.method.update(decoder_width=config.model.width, decoder_heads=config.model.heads)
    config.optim.update(lr=1.875e-4, min_lr=1e-5, warmup="10 epochs", betas=(0.9, 0.98), clip=3.0)
    config.train.duration = "300 epochs"
    return resolve(config, arg)
