r"""ViT-B/16 with BEiT-style masked prediction on ImageNet-1K, 800 epochs (arXiv 2106.08254).

  python -m mae_jax.main --config=configs/vit_b_beit.py --workdir=gs://BUCKET/vit_b_beit \
      --config.data.path=gs://BUCKET/tensorflow_datasets

Arguments: `runlocal` (two small steps on a laptop).

From BEiT's released code (beit/README.md): 75 of 196 patches masked in blocks, batch 2048, learning rate 1.5e-3, betas
0.9 and 0.98 (0.999 in the paper), weight decay 0.05 of kernels and the mask token, clipping at 3, LayerScale 0.1,
stochastic depth 0.1, 10 epochs of warm-up, crops of at least 8 % of the area. The initialization is BEiT's too: a
normal distribution of standard deviation 0.02, truncated at one standard deviation, with the last kernel of each branch
divided by the square root of twice its block's number. Differences: no color jitter; absolute positions instead of
relative position biases; and the tokens are those of a k-means vocabulary of the training images instead of a trained
tokenizer. For tokens of another tokenizer, set --config.method.target=tokens --config.data.tokens=FILE.npz
--config.data.augment=none, with data with random access (TFDS stored as array_record, a folder).

Expected (published figures with BEiT's tokenizer, not reproduced here; ImageNet-1K top-1): fine-tuned 83.2; in the
SplitMask paper 82.8, and a linear probe of 41.0 (its Table 8).
"""

from ml_collections import ConfigDict

from mae_jax.config import default, resolve, vit


def get_config(arg: str = "") -> ConfigDict:
    config = default("beit")
    config.batch_size = 2048
    config.data.update(source="tfds", name="imagenet2012:5.*.*", eval_split="validation", crop_scale=(0.08, 1.0))
    config.model.update(vit("B", patch=16), layer_scale=0.1, drop_path=0.1, pool="mean", init="normal")
    config.optim.update(lr=1.875e-4, min_lr=1e-5, warmup="10 epochs", betas=(0.9, 0.98), clip=3.0)
    return resolve(config, arg)
