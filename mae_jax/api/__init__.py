"""mae_jax from Python: load an encoder, ask it about images, train. No flags, no signals, no TensorFlow of its own.

  import mae_jax

  encoder = mae_jax.load("runs/quickstart")
  features = encoder(["cat.jpg", pixels])                  # float32 [2, D]
  mae_jax.embed(encoder, "features.parquet", images="/path/to/images")
  mae_jax.predict("runs/classifier", "cat.jpg")[0].classes
  mae_jax.train(mae_jax.recipe("quickstart"), "runs/mine")

All raise `UserError` with one line for what the caller can mend. What goes on is logged under the name 'mae_jax', at
level INFO; nothing sets logging up.
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
    """Loads an encoder, to be called with images: `load(path)(images)`.

    Args:
      path: a workdir (its newest good checkpoint), one step's folder in it, its `best`, an export, or a file or folder
        of weights of another library; local or gs://.
      batch_size: images at a time, over this process's devices; 0: 32 on each CPU device, 128 on each accelerator.
      image_size: in pixels, of weights of another library; None: as they say, else 224.
      heads: of attention, likewise where nothing says how many.

    Raises:
      UserError: nothing is there, it is damaged, or it has no single encoder.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return open_encoder(os.fspath(path), batch_size, size, heads, jax.local_devices())


def embed(encoder: Encoder | Path, to: Path, *, images: Path | None = None, config: ConfigDict | None = None,
          split: str = "", features: str = "pool", block: int = -1) -> Embedded:
    """Writes the features of every image to a file; the same call goes on where one was stopped.

    Args:
      encoder: as `load` gives it, or from where to load it.
      to: *.parquet or *.npz, local or gs://; columns as `mae_jax embed` writes them.
      images: a file, a folder or a pattern; None: the data of `config`, or without one the run's own.
      config: whose group `data` is read.
      split: of these; '': all that the config names.
      features: 'pool', 'cls', 'mean', 'patches' or 'tokens'.
      block: whose tokens; -1: the encoder's output.

    Raises:
      UserError: see `load`; or the file is there, of something else.
    """
    if images is not None and not isinstance(images, str | os.PathLike):
        raise UserError(f"images of type {type(images).__name__}; expected the name of a file or a folder, or a "
                        "pattern. Of arrays and lists, encoder(images) gives the features")
    opened, named = _opened(encoder), "" if images is None else os.fspath(images)
    parts = asked.parts_of(opened, named, config, split, all_splits=True)
    return embedding.embed(opened, parts, paths.locate(os.fspath(to), "to"), features, block, named)


def predict(encoder: Encoder | Path, images: ImageLike | Sequence[ImageLike], *, top_k: int = 5) -> list[Prediction]:
    """Returns what a classifier, a segmentation or, of a folder or a pattern, a detector says of images.

    Args:
      encoder: as `load` gives it, or from where to load it; fine-tuned.
      images: one or several arrays, PIL images or paths, as `Encoder` takes them; a folder or a pattern means all its
        images, of which one that cannot be read has an `error`.
      top_k: classes of each.

    Raises:
      UserError: see `load`; it has no head; or one of several given images cannot be used.
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
      name: as --config takes it: 'quickstart', 'folder:S', or the path of a file of your own.
      fields: dotted name → value, as {'data.path': '/images', 'optim.lr': 1e-3}.

    Raises:
      UserError: no such recipe or field, or a value that cannot work.
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
    """Trains until `train.duration`, or goes on with what the workdir holds; returns the workdir.

    The process stays the caller's: no signal handler is changed, nothing ends it, and what hangs is not noticed. An
    exception, KeyboardInterrupt among them, leaves the last checkpoint; the same call goes on from there.

    Args:
      config: as `recipe` gives it.
      workdir: a folder, local or gs://.

    Raises:
      UserError: a mistake, a workdir that is in use, a full disk at the end.
      GuardError: a guard stopped the run (losses that are not finite, too many bad images), or the workdir was lost.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(f"a config of type {type(config).__name__}; expected what mae_jax.recipe gives")
    loop.train_as_guest(config, os.fspath(workdir))
    return os.fspath(workdir)


def _from_file(recipe: str) -> ConfigDict:
    """Returns the config of 'path[:argument]'; raises UserError where no recipe is there."""
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
