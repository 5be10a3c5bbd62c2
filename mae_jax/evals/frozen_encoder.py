"""A frozen encoder: a config and a method that compute features of any data, without training."""

from typing import Any

import jax
from ml_collections import ConfigDict

from mae_jax.config import read_as_begun, resolved, with_fitting_mesh
from mae_jax.data import NO_DATA
from mae_jax.errors import UserError
from mae_jax.methods import build
from mae_jax.methods.base import Method


def frozen(config: ConfigDict, block: int) -> ConfigDict:
    """Returns the config for computing features: all images, without augmentation, on a mesh that fits the devices.

    Raises:
      UserError: the encoder has no such block.
    """
    config = with_fitting_mesh(config).copy_and_resolve_references()
    config.eval.max_examples = 1 << 31
    config.data.update(augment="none", color="none", repeats=1)
    if not -1 <= block < config.model.depth:
        raise UserError(f"--block={block}; the encoder has the blocks 0 to {config.model.depth - 1}, -1 is the last")
    return read_as_begun(config).lock()


def with_data(config: ConfigDict, other: ConfigDict) -> ConfigDict:
    """Returns `config` with the data of `other`, and with its own image size and resizing."""
    config = config.copy_and_resolve_references().unlock()
    seen = {name: config.data[name] for name in ("image_size", "resize")}
    config.data.update(other.data)
    config.data.update(seen)
    config.recipe_version = other.recipe_version  # of the reader of the data; the encoder does not depend on it
    return config.lock()


class Frozen(Method):
    """The encoder of any method up to one block; needs only the batch fields that all images have."""

    def __init__(self, config: ConfigDict, block: int):
        config = resolved(config)
        super().__init__(config, NO_DATA)
        self.of, self.block = build(config, NO_DATA), block

    def encode(self, params: Any, extras: Any, batch: Any, block: int = -1) -> jax.Array:
        return self.of.encode(params, extras, batch, self.block)
