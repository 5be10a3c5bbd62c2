r"""ViT-S/16 DINO on ImageNet-1K, 100 epochs (arXiv 2104.14294).

  python -m mae_jax.main --config=configs/vit_s_dino.py --workdir=gs://BUCKET/vit_s_dino \
      --config.data.path=gs://BUCKET/tensorflow_datasets

Arguments: `100` (the default: the settings of the released code, main_dino.py), `800` (those of the released ViT-S/16:
more and smaller local views, a higher teacher temperature), `runlocal` (two small steps on a laptop). For small data,
set a head with fewer outputs: --config.method.out_dim=1024.

Evaluations, exports and --config.init_from use the teacher. The batch is that of the released code: 512 (8 GPUs with 64
images each), in `800` 1024. mae_jax/methods/dino.py lists the differences from the released code; its `800` also learns
the norms of the last layer's weights.

Expected (README of the released code, not reproduced here; ImageNet-1K top-1 of k-NN and a linear probe): 69.3 and
about 73.8, with `800` 74.5 and 77.0.
"""

from ml_collections import ConfigDict

from mae_jax.config import default, resolve, vit


def get_config(arg: str = "") -> ConfigDict:
    config = default("dino")
    config.batch_size = 512
    config.data.update(source="tfds", name="imagenet2012:5.*.*", eval_split="validation")
    config.model.update(vit("S", patch=16), drop_path=0.1, init="normal")
    config.optim.update(lr=5e-4, min_lr=1e-6, warmup="10 epochs", betas=(0.9, 0.999), clip=3.0, weight_decay=0.04,
                        final_weight_decay=0.4)
    config.train.duration = "100 epochs"
    return resolve(config, arg, {"100": lambda _: None, "800": released})


def released(config: ConfigDict) -> None:
    """Sets the recipe of the released ViT-S/16 (its args.txt, as far as known to us)."""
    config.batch_size = 1024
    config.train.duration = "800 epochs"
    config.method.update(local_views=10, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25), teacher_temperature=0.07,
                         temperature_warmup="30 epochs")
