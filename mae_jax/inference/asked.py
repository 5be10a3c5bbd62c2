"""Shared by the commands `embed` and `predict`: opening of the encoder and the images, and the exit code."""

import logging

from ml_collections import ConfigDict

from mae_jax import errors
from mae_jax.data import value_range
from mae_jax.errors import GuardError, UserError
from mae_jax.inference import parts
from mae_jax.inference.encoder import Encoder, open_encoder
from mae_jax.inference.parts import Part

logger = logging.getLogger(__name__)


def opened(source: str, images: str, config: ConfigDict | None, split: str, all_splits: bool, batch_size: int = 0,
           heads: int = 0) -> tuple[Encoder, list[Part]]:
    """Opens an encoder and its input images; arguments and errors as in `open_encoder` and `parts_of`."""
    encoder = open_encoder(source, batch_size, heads=heads)
    return encoder, parts_of(encoder, images, config, split, all_splits)


def parts_of(encoder: Encoder, images: str, config: ConfigDict | None, split: str, all_splits: bool) -> list[Part]:
    """Opens the input images of an encoder.

    Args:
      encoder: determines the image size.
      images: a file, a folder or a pattern; '': the data of `config`, or without `config` the run's own data.
      config: a config, of which only `data` is read.
      split, all_splits: as in `parts.of_config`.

    Raises:
      UserError: there are no images, or both `images` and a config or split are given.
    """
    for flag, given in (("config", config is not None), ("split", split)):
        if images and given:
            raise UserError(f"images={images} names the images itself; leave {flag} out")
    if images:
        opened = [parts.of_images(encoder.config, images, encoder.class_names)]
    elif config is None and not encoder.of_run:
        raise UserError(f"{encoder.source} does not record which images it was trained on; give images or config")
    else:
        opened = parts.of_config(encoder.config, config, split, all_splits)
    data = opened[0].config.data
    others = bool(images) or config is not None
    if others and data.range == encoder.config.data.range and (text := value_range.darkened(opened[0].source, data)):
        logger.warning(text)
    return opened


def exit_code(encoder: Encoder, images: int, unreadable: int) -> int:
    """Returns the exit code after a finished pass.

    Args:
      encoder: whose config has the guard.
      images: number of images that were read.
      unreadable: number of images that could not be read.

    Raises:
      GuardError: more than `guard.max_bad_fraction` of the images could not be read.
    """
    most = encoder.config.guard.max_bad_fraction
    if unreadable > most * (images + unreadable):
        raise GuardError(f"{unreadable} of {images + unreadable} images could not be read, more than "
                         f"guard.max_bad_fraction={most:g} of them; what could be read is written")
    return errors.FINISHED
