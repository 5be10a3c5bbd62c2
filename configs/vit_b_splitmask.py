r"""ViT-B/16 SplitMask on ImageNet-1K, 300 epochs (arXiv 2112.10740).

  python -m mae_jax.main --config=configs/vit_b_splitmask.py --workdir=gs://BUCKET/vit_b_splitmask \
      --config.data.path=gs://BUCKET/tensorflow_datasets

Arguments: `runlocal` (two small steps on a laptop). configs/vit_s_splitmask.py is for ViT-S, configs/splitmask_small.py
for small data.

From the paper: the two halves, the decoder of 2 blocks, the discrete targets of a vocabulary of the training images,
the contrastive loss on the pooled outputs of the decoder, 300 epochs. The paper's optimizer is not known to us; we use
BEiT's (batch 2048, learning rate 1.5e-3, weight decay 0.05, clipping at 3, LayerScale 0.1, stochastic depth 0.1, 10
epochs of warm-up). Our choice: a k-means vocabulary, the decoder's width, the temperature 0.1 and the weight 1 of the
contrastive loss, crops of at least 0.2 of the area, MAE's xavier initialization instead of BEiT's, and weight decay of
the class token.

Expected (the paper's figures, not reproduced here; ImageNet-1K top-1, fine-tuned): 83.6, with ViT-S 81.5.
"""

from ml_collections import ConfigDict

from mae_jax.config import default, resolve, vit


def get_config(arg: str = "") -> ConfigDict:
    config = default("splitmask")
    config.batch_size = 2048
    config.data.update(source="tfds", name="imagenet2012:5.*.*", eval_split="validation")
    config.model.update(vit("B", patch=16), layer_scale=0.1, drop_path=0.1, pool="mean")
    config.method.update(decoder_width=config.model.width, decoder_heads=config.model.heads)
    config.optim.update(lr=1.875e-4, min_lr=1e-5, warmup="10 epochs", betas=(0.9, 0.98), clip=3.0)
    config.train.duration = "300 epochs"
    return resolve(config, arg)
