"""MAE on your own images, sized for small data.

  python -m mae_jax.main --config=configs/folder.py --workdir=runs/mine --config.data.path=/path/to/images

Images may be at any depth of sub-folders; `data.formats` lists the formats. Class folders are optional. With them
(path/<class>/*.jpg, or path/train/<class>/*.jpg and path/val/<class>/*.jpg), probes are evaluated; without them, the
held-out loss and reconstructions. Check the data first: python -m mae_jax inspect with the same flags shows how the
folders are interpreted. With very few images, set --config.data.eval_split='': the held-out tenth might be empty.

Arguments: `Ti` (the default, 5.5 M parameters in the encoder) or `S` (22 M); `laptop` (1.2 M, 40 x 40 pixels, 1250
steps: minutes on two CPU cores); `runlocal` (two small steps, also on your images).

There is no published recipe for this; all values are our choice. MAE tolerates many epochs of small data (SplitMask,
arXiv 2112.10740, keeps the number of iterations constant as the data shrink), so the length is given in examples, 2
million, instead of epochs. The batch is small; the decoder has half the width of MAE's, 256, and 4 blocks. The recipe
has not been run to its end; `python -m mae_jax bench` with the same flags measures how long it takes on your machine.
"""

from functools import partial

from ml_collections import ConfigDict

from mae_jax.config import default, resolve, vit


def get_config(arg: str = "") -> ConfigDict:
    config = default("mae")
    config.batch_size = 256
    config.data.update(source="folder", image_size=(128, 128))
    config.method.update(decoder_width=256, decoder_depth=4, decoder_heads=8)
    config.optim.update(lr=5e-4, warmup="100000 examples")
    config.train.duration = "2e6 examples"
    config.checkpoint.every = config.eval.every = "100000 examples"
    size(config, "Ti")
    return resolve(config, arg, laptop=laptop, **{name: partial(size, name=name) for name in ("Ti", "S")})


def size(config: ConfigDict, name: str) -> None:
    """Sets the encoder's size, with patches of 8 pixels: 256 patches at 128 × 128 pixels."""
    config.model.update(vit(name, patch=8))


def laptop(config: ConfigDict) -> None:
    """Shrinks images, model and run; pixels are predicted as they are, so that figures need nothing of hidden patches.
    """
    config.batch_size = 64
    config.data.update(image_size=(40, 40), crop_scale=(0.4, 1.0))
    config.eval.update(crop_ratio=(1.0,), every="625 steps")
    config.model.update(width=128, depth=6, heads=4, patch=(4, 4))
    config.method.update(target="pixel", decoder_width=96, decoder_depth=2, decoder_heads=4)
    config.optim.update(lr=6e-3, warmup="60 steps")  # a small model on small images bears far more than a ViT-L
    config.train.duration = "1250 steps"
    config.checkpoint.every = "250 steps"
