"""A small MAE on real photographs, in minutes on a laptop.

  python -m mae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

The pictures are crops of 17 photographs that scikit-image and scikit-learn install with themselves; the class of a crop
is the photograph that it was cut from. So the probes measure scene and texture identification, not object recognition.
Pixels are predicted as they are (target 'pixel'), so that the pictures under runs/quickstart/pictures need no
statistics of the hidden patches.
"""

from ml_collections import ConfigDict

from mae_jax.config import default, resolve


def get_config(arg: str = "") -> ConfigDict:
    config = default("mae")
    config.batch_size = 64
    config.data.update(image_size=(40, 40), crop_scale=(0.4, 1.0))
    config.eval.crop_ratio = (1.0,)
    config.model.update(width=128, depth=6, heads=4, patch=(4, 4))
    config.method.update(target="pixel", decoder_width=96, decoder_depth=2, decoder_heads=4)
    config.optim.update(lr=6e-3, warmup="60 steps")  # a small model on small pictures bears far more than a ViT-L
    config.train.duration = "1250 steps"
    config.checkpoint.every = "250 steps"
    config.eval.every = "625 steps"
    return resolve(config, arg)
