"""ViT-B/16 MixedAE on ImageNet-1K (arXiv 2303.17152): pictures mixed in fours, and every patch finds its own kind.

  python -m mae_jax.main --config=configs/vit_b_mixedae.py --workdir=gs://BUCKET/vit_b_mixedae \
      --config.data.path=gs://BUCKET/tensorflow_datasets
  python -m mae_jax.main --config=configs/vit_b_mixedae.py:300,naive --workdir=gs://BUCKET/naive

Arguments, separated by commas: a length, `300`, `800` or `1600` epochs (the default); the ablations below; `runlocal`
(two small steps on a laptop).

  naive        mixing alone: global attention, no contrast, no segment embedding
  oracle       attention inside the true sources, which only the mixing knows
  no_segments  homologous attention and contrast without the segment embedding
  half         two pictures to a mix (r = 0.5); the default is four (r = 0.25)
  full         every picture in each of its group's mixes, for four times the work
  first_half, last_half  homologous attention in those blocks alone

The optimiser is MAE's (Table 8 of arXiv 2111.06377) with normalised pixels. The article's: mixing, homologous
attention, contrast and segment embedding, r = 0.25. Remembered of it and not checked: r · N keys, in all blocks, the
contrast on the encoder's output with a temperature of 0.25 and a weight of 0.1, and what `full` means. Ours: two layers
and a width of 256 behind the contrast, segments of deviation 0.02 and without weight decay, one class token to a mix
and none in the decoder, features pooled as the mean and attention drawn of it, since little trains that token.

Expected, the article's figures and not ours: fine-tuned on ImageNet-1K 0.3 points above MAE (83.6 after 1600 epochs),
1.7 mIoU above it on ADE20K, 0.9 box AP above it on COCO, for 3 % more FLOPs.
"""

from ml_collections import ConfigDict

from mae_jax.config import default, resolve, vit


def get_config(arg: str = "") -> ConfigDict:
    config = default("mixedae")
    config.batch_size = 4096
    config.data.update(source="tfds", name="imagenet2012:5.*.*", eval_split="validation")
    config.model.update(vit("B", patch=16), pool="mean")
    config.eval.attention_query = "mean"
    config.train.duration = "1600 epochs"
    lengths = {epochs: lambda config, epochs=epochs: lasting(config, epochs) for epochs in ("300", "800", "1600")}
    return resolve(config, arg, lengths, {"naive": naive, "oracle": oracle},
                   {"first_half": first_half, "last_half": last_half}, no_segments=no_segments, half=half, full=full)


def lasting(config: ConfigDict, epochs: str) -> None:
    """Sets the length of training."""
    config.train.duration = f"{epochs} epochs"


def naive(config: ConfigDict) -> None:
    """Mixes as image augmentation does, with nothing that tells pictures apart."""
    config.method.update(attention="all", contrast_weight=0.0, segments=False)


def oracle(config: ConfigDict) -> None:
    """Lets a patch look at its own picture alone; the contrast stays."""
    config.method.attention = "oracle"


def no_segments(config: ConfigDict) -> None:
    """Leaves the tokens' appearance as the only trace of where they come from."""
    config.method.segments = False


def half(config: ConfigDict) -> None:
    """Mixes two pictures, of which the encoder sees half each."""
    config.method.ratio = 0.5


def full(config: ConfigDict) -> None:
    """Mixes the group as often as it has pictures."""
    config.method.mixing = "full"


def first_half(config: ConfigDict) -> None:
    """Finds homologous keys in the first half of the blocks."""
    config.method.blocks = "first_half"


def last_half(config: ConfigDict) -> None:
    """Finds homologous keys in the last half of the blocks."""
    config.method.blocks = "last_half"
