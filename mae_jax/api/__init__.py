"""The Python API of mae_jax: load an encoder, compute features, predict, train. No flags, no signal handlers.

  import mae_jax

  encoder = mae_jax.load("runs/quickstart")
  features = encoder(["cat.jpg", pixels])                  # float32 [2, D]
  mae_jax.embed(encoder, "features.parquet", images="/path/to/images")
  mae_jax.predict("runs/classifier", "cat.jpg")[0].classes
  mae_jax.train(mae_jax.recipe("quickstart"), "runs/mine")

All functions raise `UserError` with one line for an error that the caller can mend. Progress is logged by the logger
'mae_jax' at level INFO; logging is not configured. The API itself does not import TensorFlow.
"""

import difflib
import os
import runpy
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mae_jax import config as configs
from mae_jax import presets, recipe_version
from mae_jax.commands import recipes
from mae_jax.errors import GuardError, UserError
from mae_jax.inference import asked, embedding, prediction
from mae_jax.inference import parts as inference_parts
from mae_jax.inference.embedding import Embedded
from mae_jax.inference.encoder import Encoder, open_encoder
from mae_jax.inference.images import ImageLike
from mae_jax.inference.prediction import Prediction
from mae_jax.param_tree import flat
from mae_jax.storage import paths
from mae_jax.training import loop

__all__ = ["Embedded", "Encoder", "GuardError", "Prediction", "UserError", "embed", "load", "predict", "recipe",
           "train"]

Path = str | os.PathLike[str]


def load(path: Path, *, batch_size: int = 0, image_size: int | tuple[int, int] | None = None, heads: int = 0
         ) -> Encoder:
    """Loads an encoder; `load(path)(images)` returns features, float32 [n, D].

    Args:
      path: a workdir (its newest good checkpoint), one step's folder in it, its `best`, an export, or a file or folder
        of weights of another library; local or gs://.
      batch_size: images per batch, over this process's devices; 0: 32 per CPU device, 128 per accelerator.
      image_size: image size in pixels, (height, width) or one number, for weights of another library; None: the size
        that they state, else 224.
      heads: number of attention heads, for weights that do not state it.

    Raises:
      UserError: the path does not exist, is damaged, or does not have exactly one encoder.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return open_encoder(os.fspath(path), batch_size, size, heads, jax.local_devices())


def embed(encoder: Encoder | Path, to: Path, *, images: Path | None = None, config: ConfigDict | None = None,
          split: str = "", features: str = "pool", block: int = -1) -> Embedded:
    """Writes the features of every image to a file; after an interruption, the same call resumes.

    Args:
      encoder: an encoder of `load`, or the path to load one from.
      to: *.parquet or *.npz, local or gs://, with the columns of `mae_jax embed`.
      images: a file, a folder or a pattern; None: the data of `config` or, without one, of the run.
      config: a config with the group `data`.
      split: the split to read; '': all splits of the config.
      features: 'pool', 'cls', 'mean', 'patches' or 'tokens'.
      block: the block whose tokens are used; -1: the encoder's output.

    Raises:
      UserError: see `load`; or the file exists with other features.
    """
    if images is not None and not isinstance(images, str | os.PathLike):
        raise UserError(f"images of type {type(images).__name__}; expected the name of a file or a folder, or a "
                        "pattern. Of arrays and lists, encoder(images) gives the features")
    opened, named = _opened(encoder), "" if images is None else os.fspath(images)
    parts = asked.parts_of(opened, named, config, split, all_splits=True)
    return embedding.embed(opened, parts, paths.locate(os.fspath(to), "to"), features, block, named)


def predict(encoder: Encoder | Path, images: ImageLike | Sequence[ImageLike], *, top_k: int = 5) -> list[Prediction]:
    """Returns the predictions of a classifier or a segmentation or, for a folder or a pattern, also of a detector.

    Args:
      encoder: a fine-tuned encoder of `load`, or the path to load one from.
      images: one or several arrays, PIL images or paths, as for `Encoder`; a folder or a pattern means all its images,
        and an unreadable one gets a prediction with an `error`.
      top_k: number of classes per image.

    Raises:
      UserError: see `load`; the encoder has no head; or one of several given images cannot be used.
    """
    if top_k < 1:
        raise UserError(f"top_k={top_k}; expected 1 class or more")
    opened = _opened(encoder)
    if isinstance(images, str | os.PathLike) and not os.path.isfile(images):
        part = inference_parts.of_images(opened.config, os.fspath(images), opened.class_names)
        return list(prediction.predictions(opened, part, prediction.Score(opened), top_k))
    return prediction.of_images(opened, images, top_k)


def recipe(name: str, fields: dict[str, Any] | None = None) -> ConfigDict:
    """Returns the config of a recipe.

    Args:
      name: a value of --config: 'quickstart', 'folder:S', or the path of your own file.
      fields: overrides, dotted name → value, as {'data.path': '/images', 'optim.lr': 1e-3}.

    Raises:
      UserError: no such recipe or field, or an invalid value.
    """
    fields = {field: os.fspath(value) if isinstance(value, os.PathLike) else value
              for field, value in (fields or {}).items()}
    with presets.given(set(fields)):
        config = _from_file(recipes.locate(name))
    known = flat(config)
    for field, value in fields.items():
        if field not in known:
            near = [f"did you mean {each!r}?" for each in difflib.get_close_matches(str(field), known, n=1)]
            raise UserError(f"unknown config field {field!r}; " + (recipe_version.former(field) or "".join(
                near) or f"mae_jax train --config={name} --help lists them"))
        try:
            config.update_from_flattened_dict({field: value})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"the config field {field!r} does not take {value!r}: {error}") from None
    configs.validate(config)
    return config


def train(config: ConfigDict, workdir: Path) -> str:
    """Trains until `train.duration`, resuming the run in the workdir if there is one; returns the workdir.

    Training changes no signal handler, never exits the process, and does not detect a hang. An exception, including
    KeyboardInterrupt, leaves the last checkpoint; the same call resumes from it.

    Args:
      config: a config, as of `recipe`.
      workdir: a folder, local or gs://.

    Raises:
      UserError: an invalid config, a workdir that is in use, or a full disk at the end.
      GuardError: a guard stopped the run (losses that are not finite, too many bad images), or the workdir was lost.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(f"a config of type {type(config).__name__}; expected what mae_jax.recipe gives")
    loop.train_as_guest(config, os.fspath(workdir))
    return os.fspath(workdir)


def _from_file(recipe: str) -> ConfigDict:
    """Returns the config of 'path[:argument]'; raises UserError if the file is not a recipe."""
    path, colon, argument = recipe.partition(":")
    if not os.path.isfile(path):
        raise UserError(f"cannot read the config file {path}: no such file")
    try:
        get_config = runpy.run_path(path).get("get_config")
    except SyntaxError as error:
        raise UserError(f"{path} is no Python file: {error}") from None
    config = get_config(*[argument] * bool(colon)) if callable(get_config) else None
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path} has no get_config(), which returns a ConfigDict")
    return config


def _opened(encoder: Encoder | Path) -> Encoder:
    return encoder if isinstance(encoder, Encoder) else load(encoder)
