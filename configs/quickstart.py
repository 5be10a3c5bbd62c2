"""A small MAE that learns letters on photographs, in minutes on a laptop.

  python -m mae_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

White letters, A to Z, in 16 fonts on dark parts of photographs (`mae_jax/data/sources/letters.py`; nothing is
downloaded). It is not told the letters. Every 2000 steps a linear layer is fitted on the frozen features of 780 images
whose letters it is told, and names those of 780 others, in fonts and on parts of photographs that nothing was trained
on. Beside it stand the same layer on the untrained encoder and on raw pixels. Results: studies/quickstart/results.md.
Pixels are predicted as they are (target 'pixel'), so that the figures under runs/quickstart/pictures need no statistics
of the hidden patches. All values are our choice.
"""

from ml_collections import ConfigDict

from mae_jax.config import default, resolve


def get_config(arg: str = "") -> ConfigDict:
    config = default("mae")
    config.batch_size = 16  # for a small model many steps of few images learn faster than few steps of many
    config.data.update(source="letters", image_size=(32, 32), augment="none")  # mirrored letters are none
    config.data.workers = "0"  # letters are made faster than processes start
    config.model.update(width=96, depth=4, heads=4, patch=(4, 4), pool="mean")
    config.method.update(target="pixel", decoder_width=64, decoder_depth=1, decoder_heads=4)
    config.optim.update(lr=2e-2, warmup="100 steps", betas=(0.9, 0.98))  # a small model bears far more than a ViT-L
    config.train.duration = "4000 steps"
    config.checkpoint.every = "1000 steps"
    config.eval.update(every="2000 steps", max_examples=780, crop_ratio=(1.0,))
    config.log.every = "200 steps"
    return resolve(config, arg)
