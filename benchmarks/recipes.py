"""Configs that several benchmarks share."""

from ml_collections import ConfigDict

from mae_jax import config as configs


def mae(size: str, batch_size: int) -> ConfigDict:
    """Returns the published recipe for normalized pixels, of a ViT of that size with patches of 16."""
    config = configs.default("mae")
    config.model.update(configs.vit(size, patch=16))
    config.batch_size = batch_size
    return config
